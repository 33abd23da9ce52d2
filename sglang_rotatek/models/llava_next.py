"""LLaVA-NeXT in the Hugging Face layout (``LlavaNextForConditionalGeneration``), native in SGLang.

SGLang has the original LLaVA layout alone; this one falls to its Transformers backend, without
radix cache and chunked prefill. Text backbones: Llama, Mistral, Qwen2. Vision tower: CLIP.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.managers.mm_utils import (
    MultiModalityDataPaddingPatternMultimodalTokens,
    general_mm_embed_routine,
)
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputs
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.models.llama import LlamaForCausalLM
from sglang.srt.models.mistral import MistralForCausalLM
from sglang.srt.models.qwen2 import Qwen2ForCausalLM
from sglang.srt.utils import add_prefix
from torch import nn
from transformers import AutoModelForCausalLM, CLIPVisionModel, LlavaNextConfig
from transformers.activations import ACT2FN
from transformers.image_processing_utils import select_best_resolution

from sglang_rotatek.config import RotateKError

TEXT_MODELS = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM, "qwen2": Qwen2ForCausalLM}
# Checkpoint name -> this model's name, first match: published checkpoints and what Transformers 5
# calls them.
_RENAMES = (
    (re.compile(r"^(model\.language_model\.|language_model\.model\.)"), "language_model.model."),
    (re.compile(r"^(language_model\.)?lm_head\."), "language_model.lm_head."),
    (re.compile(r"^(model\.)?vision_tower\.(vision_model\.)?"), "vision_tower."),
    (re.compile(r"^(model\.)?multi_modal_projector\."), "projector."),
    (re.compile(r"^(model\.)?image_newline$"), "image_newline"),
)
_NOT_WEIGHTS = ("rotary_emb.inv_freq", "embeddings.position_ids")


def own_name(name: str) -> str:
    """The name in this model of a weight called ``name`` in a checkpoint; unknown names stay as
    they are."""
    for pattern, replacement in _RENAMES:
        renamed, count = pattern.subn(replacement, name)
        if count:
            return renamed
    return name


def tile_grid(config: LlavaNextConfig, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the tiles of an image of ``size`` (height, width) px."""
    height, width = select_best_resolution(size, config.image_grid_pinpoints)
    tile = config.vision_config.image_size
    return height // tile, width // tile


def unpadded_grid(config: LlavaNextConfig, size: tuple[int, int]) -> tuple[range, range]:
    """Rows and columns of patches, over all tiles, that hold picture and not padding.

    Scaled to fit the tiles, a picture is padded along one side; half of what is left over is cut
    off at each end, rounded down, as the tokens of the Hugging Face processor are counted.
    """
    tile_rows, tile_columns = tile_grid(config, size)
    side = config.vision_config.image_size // config.vision_config.patch_size
    rows, columns = tile_rows * side, tile_columns * side
    height, width = size
    if width / height > columns / rows:
        kept = int(round(height * (columns / width), 7))
        cut = (rows - kept) // 2
        return range(cut, rows - cut), range(columns)
    kept = int(round(width * (rows / height), 7))
    cut = (columns - kept) // 2
    return range(rows), range(cut, columns - cut)


def has_class_token(config: LlavaNextConfig) -> bool:
    """Whether the visual tokens of the whole picture start with CLIP's class token."""
    return config.vision_feature_select_strategy == "full"


def num_image_tokens(config: LlavaNextConfig, size: tuple[int, int]) -> int:
    """Tokens of an image of ``size`` (height, width) px: the whole picture, then its tiles' rows
    with separators."""
    rows, columns = unpadded_grid(config, size)
    side = config.vision_config.image_size // config.vision_config.patch_size
    return side * side + has_class_token(config) + len(rows) * (len(columns) + 1)


class Projector(nn.Module):
    """Vision features [..., vision] to embeddings [..., hidden]."""

    def __init__(self, config: LlavaNextConfig) -> None:
        super().__init__()
        layers = config.vision_feature_layer
        inputs = config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
        outputs, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(inputs, outputs, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(outputs, outputs, bias=bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


class LlavaNextForConditionalGeneration(nn.Module):
    """The name is the architecture's in config.json, by which SGLang finds it."""

    def __init__(self, config: LlavaNextConfig, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        text_type, vision_type = config.text_config.model_type, config.vision_config.model_type
        if text_type not in TEXT_MODELS or vision_type != "clip_vision_model":
            raise RotateKError(
                f"LLaVA-NeXT expects a text model of {', '.join(TEXT_MODELS)} and a "
                f"clip_vision_model tower, got {text_type} with {vision_type}: serve it with "
                "--model-impl transformers."
            )
        self.config, self.quant_config = config, quant_config
        config.text_config.tie_word_embeddings = config.tie_word_embeddings
        self.language_model = TEXT_MODELS[text_type](
            config.text_config,
            quant_config=quant_config,
            prefix=add_prefix("language_model", prefix),
        )
        self.vision_tower = CLIPVisionModel(config.vision_config)
        self.projector = Projector(config)
        self.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size))

    def pad_input_ids(self, input_ids: array[int], mm_inputs: MultimodalInputs) -> array[int]:
        return MultiModalityDataPaddingPatternMultimodalTokens().pad_input_tokens(
            input_ids, mm_inputs
        )

    def get_image_feature(self, items: list[MultimodalDataItem]) -> torch.Tensor:
        """Embeddings [tokens of all items, hidden]; an item's feature is
        [1 + tiles, 3, side, side]."""
        weight = self.projector.linear_1.weight
        tiles = torch.cat([torch.as_tensor(item.feature) for item in items]).to(
            weight.device, weight.dtype
        )
        states = self.vision_tower(tiles, output_hidden_states=True).hidden_states
        layers = self.config.vision_feature_layer
        chosen = (
            states[layers]
            if isinstance(layers, int)
            else torch.cat([states[layer] for layer in layers], dim=-1)
        )
        images = self.projector(chosen).split([len(item.feature) for item in items])
        sizes = [tuple(item.image_sizes) for item in items]
        return torch.cat(
            [self.pack(features, size) for features, size in zip(images, sizes, strict=True)]
        )

    def pack(self, features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Features [1 + tiles, 1 + patches, hidden] of an image of ``size`` (height, width) px in
        prompt order."""
        (tile_rows, tile_columns), (rows, columns) = (
            tile_grid(self.config, size),
            unpadded_grid(self.config, size),
        )
        whole = features[0] if has_class_token(self.config) else features[0, 1:]
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        grid = (
            features[1:, 1:]
            .view(tile_rows, tile_columns, side, side, -1)
            .transpose(1, 2)
            .flatten(2, 3)
            .flatten(0, 1)
        )
        grid = grid[rows.start : rows.stop, columns.start : columns.stop]
        ends = self.image_newline.expand(len(rows), 1, -1)
        return torch.cat((whole, torch.cat((grid, ends), dim=1).flatten(0, 1)))

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        **kwargs: Any,
    ) -> torch.Tensor:
        return general_mm_embed_routine(
            input_ids=input_ids,
            forward_batch=forward_batch,
            language_model=self.language_model,
            data_embedding_funcs={Modality.IMAGE: self.get_image_feature},
            positions=positions,
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """RotateKError that names the weights that are missing or that the model has no place
        for."""
        own = dict(self.named_parameters())
        seen: set[str] = set()

        def of_language_model() -> Iterable[tuple[str, torch.Tensor]]:
            for checkpoint_name, tensor in weights:
                name = own_name(checkpoint_name)
                if name.endswith(_NOT_WEIGHTS):
                    continue
                seen.add(name)
                if name.startswith("language_model."):
                    yield name.removeprefix("language_model."), tensor
                elif name in own:
                    default_weight_loader(own[name], tensor)

        self.language_model.load_weights(of_language_model())
        # Quantized checkpoints hold other tensors than the model on paper.
        if self.quant_config is None:
            self._check_names(seen, own)

    def _check_names(self, seen: set[str], own: dict[str, nn.Parameter]) -> None:
        with torch.device("meta"):
            text = AutoModelForCausalLM.from_config(self.config.text_config).state_dict()
        expected = {f"language_model.{name}" for name in text}
        expected |= {name for name in own if not name.startswith("language_model.")}
        tied = {"language_model.lm_head.weight"} if self.config.tie_word_embeddings else set()
        for problem, names in (
            ("lacks", expected - seen - tied),
            ("has unknown", seen - expected - tied),
        ):
            if names:
                shown = ", ".join(sorted(names)[:5])
                raise RotateKError(
                    f"the LLaVA-NeXT checkpoint {self.config._name_or_path or ''} {problem} "
                    f"weights, {len(names)} in all: {shown}; expected those of "
                    "LlavaNextForConditionalGeneration. Download it again."
                )


EntryClass = LlavaNextForConditionalGeneration
