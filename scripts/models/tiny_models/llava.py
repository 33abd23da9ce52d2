"""LLaVA in its original layout: LLaVA-1.6 (Llama and CLIP) and LLaVA-OneVision (Qwen2 and SigLIP).

config.json names the vision tower, a sub-directory, by absolute path: make the model again after
moving it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from architectures import (
    LLAVA_CHAT_TEMPLATE,
    LLAVA_ROLES,
    LLAVA_SPECIALS,
    llava_processor,
    llava_text_config,
    write_json,
)
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from .decoder import HIDDEN_SIZE, decoder_shape, randomise, sharpen
from .tokenizer import make_tokenizer

LLAVA_IMAGE_SIZE, LLAVA_PATCH_SIZE, LLAVA_TOWER_SIZE = 140, 14, 64
LLAVA_PINPOINTS = [[140, 280], [280, 140], [280, 280]]

TOWER_SHAPE = dict(
    hidden_size=LLAVA_TOWER_SIZE,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=LLAVA_IMAGE_SIZE,
    patch_size=LLAVA_PATCH_SIZE,
)


@dataclass(frozen=True)
class Llava:
    """What tells one model of the original layout from another.

    SGLang chooses the tower's class by the word "clip" or "siglip" in its path, here
    ``tower_name``.
    """

    architecture: str
    text_config_class: type[PreTrainedConfig]
    text_model_class: type[PreTrainedModel]
    tower_name: str
    tower_config: PreTrainedConfig
    tower_class: type[PreTrainedModel]
    image_processor: dict[str, Any]
    config: dict[str, Any]


def clip_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(**TOWER_SHAPE, projection_dim=LLAVA_TOWER_SIZE)


SQUARE = {"height": LLAVA_IMAGE_SIZE, "width": LLAVA_IMAGE_SIZE}
LLAVA_NEXT = Llava(
    "LlavaLlamaForCausalLM",
    LlamaConfig,
    LlamaForCausalLM,
    "clip-vision-tower",
    clip_config(),
    CLIPVisionModel,
    CLIPImageProcessor(size={"shortest_edge": LLAVA_IMAGE_SIZE}, crop_size=SQUARE).to_dict()
    | {"image_processor_type": "CLIPImageProcessor"},
    {
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": LLAVA_PINPOINTS,
        "mm_vision_select_feature": "patch",
    },
)
# Nine tiles hold more than anyres_max_4 leaves, so large pictures are scaled down after the tower,
# as at full size.
LLAVA_ONEVISION = Llava(
    "LlavaQwenForCausalLM",
    Qwen2Config,
    Qwen2ForCausalLM,
    "siglip-vision-tower",
    SiglipVisionConfig(**TOWER_SHAPE),
    SiglipVisionModel,
    SiglipImageProcessor(size=SQUARE).to_dict() | {"image_processor_type": "SiglipImageProcessor"},
    {
        "image_aspect_ratio": "anyres_max_4",
        "image_grid_pinpoints": [
            [LLAVA_IMAGE_SIZE * columns, LLAVA_IMAGE_SIZE * rows]
            for columns in (1, 2, 3)
            for rows in (1, 2, 3)
        ],
        "mm_vision_select_feature": "patch",
    },
)


def make_llava(out: Path, layers: int, generator: torch.Generator, kind: Llava) -> None:
    tokenizer = make_llava_tokenizer(out)
    text_config = llava_text_config(tokenizer, kind.text_config_class, decoder_shape(layers))
    language_model = kind.text_model_class(text_config).to(torch.bfloat16)
    randomise(language_model, generator)
    sharpen(language_model, tokenizer, generator)
    weights = {name: tensor.contiguous() for name, tensor in language_model.state_dict().items()}
    weights |= connector_weights(generator)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})

    tower = kind.tower_class(kind.tower_config)
    randomise(tower, generator)
    tower.half().save_pretrained(out / kind.tower_name)
    write_config(out, text_config, kind, tokenizer.convert_tokens_to_ids("<image>"))


def make_llava_tokenizer(out: Path) -> PreTrainedTokenizerFast:
    return make_tokenizer(out, LLAVA_SPECIALS, LLAVA_CHAT_TEMPLATE, **LLAVA_ROLES)


def connector_weights(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The two-layer projector and the row separator, under the names of the original layout."""

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(torch.bfloat16)

    return {
        "model.mm_projector.0.weight": random(HIDDEN_SIZE, LLAVA_TOWER_SIZE),
        "model.mm_projector.0.bias": random(HIDDEN_SIZE),
        "model.mm_projector.2.weight": random(HIDDEN_SIZE, HIDDEN_SIZE),
        "model.mm_projector.2.bias": random(HIDDEN_SIZE),
        "model.image_newline": random(HIDDEN_SIZE),
    }


def write_config(
    out: Path, text_config: PreTrainedConfig, kind: Llava, image_token_id: int
) -> None:
    config = text_config.to_dict()
    config.pop("head_dim")
    config |= kind.config | {
        "architectures": [kind.architecture],
        "model_type": "llava",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "image_token_index": image_token_id,
        "image_token_id": image_token_id,
        "mm_vision_tower": str(out / kind.tower_name),
        "mm_hidden_size": LLAVA_TOWER_SIZE,
        "mm_projector_type": "mlp2x_gelu",
        "projector_hidden_act": "gelu",
        "mm_vision_select_layer": -2,
        "mm_patch_merge_type": "spatial_unpad",
        "text_config": text_config.to_dict(),
        "vision_config": kind.tower_config.to_dict(),
    }
    write_json(out / "config.json", config)
    write_json(
        out / "preprocessor_config.json",
        kind.image_processor | {"processor_class": "LlavaProcessor"},
    )
    write_json(out / "processor_config.json", llava_processor("LlavaProcessor", LLAVA_PATCH_SIZE))
