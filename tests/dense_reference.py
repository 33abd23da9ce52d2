"""An oracle outside the server: greedy image chats with Hugging Face models and rotated Keys
rebuilt to full width.

    chat = DenseChat(model_dir, RowFormat(rank=32, key_bits=16, value_bits=16))
    logprobs = chat.turn(messages, answer_token_ids)     # teacher-forced
    token_ids, logprobs = chat.generate(messages, 16)    # greedy

``messages`` is the whole conversation so far, in the form that /v1/chat/completions takes; an image
part holds a data URL (``image_url``) or a PIL picture (``{"type": "image", "image": picture}``),
and for LLaVA with several images also ``"modalities": "multi-images"``, which SGLang needs too. A
DenseChat is one conversation:
the next turn keeps the cache up to the first token that differs, as a radix cache does, and
prefills the rest.

After each prefill (or each chunk of ``chunk_tokens``), every image's Keys of that forward, after
RoPE, are replaced in the cache by what their rows decode to: ``mean + P_q z`` with z = P_k^T (k -
mean) in the paper's, the basis ``pca`` being fitted on the exact Keys of that segment; so are the
Values, and with ``fp8_text`` all text. So the forward itself attends to exact Keys and Values, and
all later ones to what is stored; but a decode step stores its own text first. Full head_dim as rank
with 16 bits changes nothing but the last bits.

Limits: fp32 on the CPU, one conversation at a time, `pca` alone (the others need window queries),
images but no video, at most 16 images for LLaVA (SGLang pools them beyond). SGLang switches chunked
prefill off for LLaVA, so give ``chunk_tokens`` for Qwen alone when comparing with a server.
"""

from __future__ import annotations

import base64
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from server_plugin import Dumped
from transformers import AutoImageProcessor, AutoTokenizer, DynamicCache

from sglang_rotatek.basis import pca
from sglang_rotatek.kernels import coded
from sglang_rotatek.kernels.row_format import RowFormat

FIRST_PAD_ID = 1_000_000
Message = dict[str, Any]


class Prompt(Protocol):
    """One rendered conversation.

    ids: token ids, where all tokens of an image are one pad id >= FIRST_PAD_ID that depends on its
    pixels.
    """

    ids: list[int]

    def embed(self, start: int, end: int) -> torch.Tensor:
        """Input embeddings [end - start, hidden] of one forward over these positions."""

    def rope_positions(self, start: int, end: int) -> torch.Tensor:
        """What the model takes as position_ids, batch of one; positions past the prompt are the
        answer's."""


class Backbone(Protocol):
    """A model: its prompts, and its language model and head."""

    def prompt(self, messages: list[Message]) -> Prompt: ...

    def embed_token(self, token_id: int) -> torch.Tensor: ...

    def forward(
        self, embeds: torch.Tensor, rope_positions: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        """Logits [vocab] of the last position; the cache grows by the new Keys and values."""


class DenseChat:
    """One conversation. ``rows``: the format of visual rows, whose 16 bits are fp32 here;
    ``fp8_text`` as --kv-cache-dtype fp8_e4m3; ``min_image_tokens`` and ``segment_tokens`` as the
    flags. ``dumped``: a server's codes to take instead of the reference's own, from which they must
    not be further than those are from exact."""

    def __init__(
        self,
        model_dir: Path | str,
        rows: RowFormat,
        chunk_tokens: int | None = None,
        min_image_tokens: int = 1,
        segment_tokens: int | None = None,
        backbone: Backbone | None = None,
        fp8_text: bool = False,
        dumped: Dumped | None = None,
    ) -> None:
        self.backbone = backbone or load_backbone(model_dir)
        self.rows = rows
        self.chunk_tokens = chunk_tokens
        self.min_image_tokens = min_image_tokens
        self.segment_tokens = segment_tokens
        self.fp8_text = fp8_text
        self.dumped = dumped
        self.cache = StoringCache()
        self.cached_ids: list[int] = []
        self.cached_tokens = 0

    def turn(self, messages: list[Message], answer_token_ids: list[int]) -> list[float]:
        """The log-probability of every token of a given answer."""
        given = iter(answer_token_ids)
        return self._answer(messages, len(answer_token_ids), lambda logprobs: next(given))[1]

    def generate(self, messages: list[Message], num_tokens: int) -> tuple[list[int], list[float]]:
        """The greedy answer of ``num_tokens`` tokens, end tokens ignored, and its
        log-probabilities."""
        return self._answer(messages, num_tokens, lambda logprobs: int(logprobs.argmax()))

    @torch.inference_mode()
    def _answer(
        self, messages: list[Message], num_tokens: int, choose: Callable[[torch.Tensor], int]
    ) -> tuple[list[int], list[float]]:
        prompt = self.backbone.prompt(messages)
        logits = self._prefill(prompt)
        token_ids: list[int] = []
        scores: list[float] = []
        for _ in range(num_tokens):
            logprobs = logits.float().log_softmax(-1)
            token_ids.append(choose(logprobs))
            scores.append(float(logprobs[token_ids[-1]]))
            # Not the last one: nothing follows it, and the chunks of the next turn start with it.
            if len(token_ids) < num_tokens:
                logits = self._decode(prompt, token_ids[-1])
        return token_ids, scores

    def _prefill(self, prompt: Prompt) -> torch.Tensor:
        """Compute what the cache lacks, in chunks, and rotate the images in it. Logits [vocab] of
        the last token."""
        # At least one token must be computed to have logits.
        self.cached_tokens = start = min(
            common_prefix(self.cached_ids, prompt.ids), len(prompt.ids) - 1
        )
        self.cache.crop(start)
        while start < len(prompt.ids):
            end = min(start + (self.chunk_tokens or len(prompt.ids)), len(prompt.ids))
            logits = self.backbone.forward(
                prompt.embed(start, end), prompt.rope_positions(start, end), self.cache
            )
            if self.fp8_text:
                self._round_text(prompt.ids, start, end)
            self._rotate_images(prompt.ids, start, end)
            start = end
        self.cached_ids = list(prompt.ids)
        return logits

    def _decode(self, prompt: Prompt, token_id: int) -> torch.Tensor:
        at = len(self.cached_ids)
        self.cached_ids.append(token_id)
        self.cache.rounds_new = self.fp8_text
        logits = self.backbone.forward(
            self.backbone.embed_token(token_id), prompt.rope_positions(at, at + 1), self.cache
        )
        self.cache.rounds_new = False
        return logits

    def _round_text(self, ids: list[int], start: int, end: int) -> None:
        is_full = torch.ones(end, dtype=torch.bool)
        is_full[:start] = False
        for low, high in self._segments(ids, start, end):
            is_full[low:high] = False
        for layer in self.cache.layers:
            for tensor in (layer.keys, layer.values):
                tensor[:, :, is_full.nonzero()[:, 0]] = in_fp8(
                    tensor[:, :, is_full.nonzero()[:, 0]]
                )

    def _rotate_images(self, ids: list[int], start: int, end: int) -> None:
        """Replace the Keys and Values of every segment within the positions [start, end) that were
        just computed."""
        for low, high in self._segments(ids, start, end):
            self._rotate_segment(low, high)

    def _segments(self, ids: list[int], start: int, end: int) -> Iterator[tuple[int, int]]:
        for image_start, image_end in image_spans(ids):
            if image_end - image_start < self.min_image_tokens:
                continue
            width = self.segment_tokens or image_end - image_start
            for grid_start in range(image_start, image_end, width):
                low, high = max(start, grid_start), min(end, grid_start + width, image_end)
                if low < high:
                    yield low, high

    def _rotate_segment(self, start: int, end: int) -> None:
        for index, layer in enumerate(self.cache.layers):
            # [n, H, D]
            exact = [x[0, :, start:end].transpose(0, 1) for x in (layer.keys, layer.values)]
            values = coded.decode_values(
                coded.encode_values(exact[1], self.rows.value_bits), self.rows.value_bits
            )
            decoded = [self._decoded_keys(exact[0]), values]
            if self.dumped is not None:
                own, decoded = decoded, self.dumped.next(index)
                for theirs, ours, x in zip(decoded, own, exact, strict=True):
                    # A few tokens are coded without an error; the server's Keys differ in their
                    # last bits.
                    limit = 1.1 * (ours - x).norm() + 1e-4 * x.norm()
                    assert (theirs - x).norm() < limit, "the server's codes are worse"
            layer.keys[0, :, start:end] = decoded[0].transpose(0, 1)
            layer.values[0, :, start:end] = decoded[1].transpose(0, 1)

    def _decoded_keys(self, keys: torch.Tensor) -> torch.Tensor:
        if self.rows.has_residual:
            basis = pca.fit_coded(keys, keys[:0], self.rows.rank)
            codes = coded.encode_keys(keys, basis, self.rows.key_bits)
            return coded.decode_keys(*codes, basis, self.rows.key_bits)
        basis = pca.fit(keys, keys[:0], self.rows.rank)
        z = torch.einsum("nhd,hdr->nhr", keys - basis.mean, basis.key_map)
        return torch.einsum("nhr,hdr->nhd", z, basis.query_map) + basis.mean


class StoringCache(DynamicCache):
    """``rounds_new``: new Keys and Values are in FP8 before they are attended to, as a decode step
    has them."""

    rounds_new = False

    def update(self, key_states, value_states, *arguments, **kwargs):
        if self.rounds_new:
            key_states, value_states = in_fp8(key_states), in_fp8(value_states)
        return super().update(key_states, value_states, *arguments, **kwargs)


def in_fp8(x: torch.Tensor) -> torch.Tensor:
    return coded.to_fp8(x).to(x.dtype)


def load_backbone(model_dir: Path | str) -> Backbone:
    """The backbone of a checkpoint directory; share it between DenseChats, it keeps no
    conversation."""
    config = json.loads((Path(model_dir) / "config.json").read_text())
    backbones = {
        "Qwen2VLForConditionalGeneration": QwenBackbone,
        "Qwen2_5_VLForConditionalGeneration": QwenBackbone,
        "Qwen3VLForConditionalGeneration": QwenBackbone,
        "LlavaLlamaForCausalLM": LlavaBackbone,
        "LlavaNextForConditionalGeneration": LlavaNextBackbone,
    }
    return backbones[config["architectures"][0]](model_dir)


class QwenBackbone:
    """Qwen2-VL, Qwen2.5-VL or Qwen3-VL as Transformers has it: M-RoPE positions over the whole
    conversation. Embeddings of Qwen3-VL have what the first layers add behind them, zeros for
    text."""

    def __init__(self, model_dir: Path | str) -> None:
        from transformers import AutoModelForImageTextToText

        self.model = AutoModelForImageTextToText.from_pretrained(
            model_dir, dtype=torch.float32
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self.image_processor = AutoImageProcessor.from_pretrained(model_dir)

    def prompt(self, messages: list[Message]) -> QwenPrompt:
        ids, images = render(self.tokenizer, messages)
        return QwenPrompt(self, ids, [as_picture(part) for part in images])

    def embed_token(self, token_id: int) -> torch.Tensor:
        return self.model.get_input_embeddings()(torch.tensor([token_id]))

    def forward(
        self, embeds: torch.Tensor, rope_positions: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        embeds, *added = embeds.split(self.model.config.text_config.hidden_size, dim=1)
        deepstack = {}
        if added:
            deepstack = {
                "visual_pos_masks": torch.ones(1, len(embeds), dtype=torch.bool),
                "deepstack_visual_embeds": added,
            }
        hidden = self.model.model.language_model(
            inputs_embeds=embeds[None],
            position_ids=rope_positions,
            past_key_values=cache,
            use_cache=True,
            **deepstack,
        ).last_hidden_state
        return self.model.lm_head(hidden[0, -1])


class QwenPrompt:
    """``pixels``, ``grid``: what the image processor made of the pictures, if there are any."""

    @torch.inference_mode()
    def __init__(
        self, backbone: QwenBackbone, template_ids: list[int], pictures: list[Image.Image]
    ) -> None:
        model = backbone.model
        self.ids, token_ids, features, grid = template_ids, template_ids, [], None
        if pictures:
            processed = backbone.image_processor(images=pictures, return_tensors="pt")
            self.pixels, self.grid = pixels, grid = (
                processed["pixel_values"],
                processed["image_grid_thw"],
            )
            found = model.model.get_image_features(pixels, grid)
            levels = (found.pooler_output, *getattr(found, "deepstack_features", ()))
            features = [torch.cat(parts, dim=1) for parts in zip(*levels, strict=True)]
            patches = pixels.split(grid.prod(-1).tolist())
            lengths = [len(feature) for feature in features]
            pad_ids = [pad_id(patch.numpy()) for patch in patches]
            image_token = model.config.image_token_id
            self.ids = expand_images(template_ids, image_token, pad_ids, lengths)
            token_ids = expand_images(
                template_ids, image_token, [image_token] * len(pad_ids), lengths
            )
        ids = torch.tensor([token_ids])
        self._embeds = model.get_input_embeddings()(ids[0])
        is_image = torch.tensor(self.ids) >= FIRST_PAD_ID
        if features:
            added = features[0].shape[1] - self._embeds.shape[1]
            self._embeds = torch.nn.functional.pad(self._embeds, (0, added))
            self._embeds[is_image] = torch.cat(features)
        self._positions, delta = model.model.get_rope_index(
            ids, is_image[None].int(), image_grid_thw=grid
        )
        self._delta = int(delta)

    def embed(self, start: int, end: int) -> torch.Tensor:
        return self._embeds[start:end]

    def rope_positions(self, start: int, end: int) -> torch.Tensor:
        if start >= len(self.ids):
            return (torch.arange(start, end) + self._delta).expand(3, 1, -1)
        return self._positions[:, :, start:end]


class LlavaBackbone:
    """LLaVA-1.6 in its original layout: a Llama whose image embeddings are packed as SGLang's
    llava.py does.

    A conversation with one image cuts it into tiles (anyres, rows ended by image_newline, padding
    cut away); one whose image parts say ``multi-images`` pads each image to a square of one tile.
    """

    def __init__(self, model_dir: Path | str) -> None:
        from safetensors.torch import load_file
        from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM

        model_dir = Path(model_dir)
        self.config = json.loads((model_dir / "config.json").read_text())
        weights = {}
        for part in sorted(model_dir.glob("*.safetensors")):
            weights |= {name: tensor.float() for name, tensor in load_file(part).items()}
        connector = {
            name: weights.pop(name)
            for name in list(weights)
            if "mm_projector" in name or "newline" in name
        }
        self.newline = connector["model.image_newline"]
        self._projector = [
            connector[f"model.mm_projector.{i}.{kind}"]
            for i in (0, 2)
            for kind in ("weight", "bias")
        ]
        self.model = LlamaForCausalLM(LlamaConfig(**self.config["text_config"])).float().eval()
        missing = self.model.load_state_dict(weights, strict=False).missing_keys
        if missing:
            raise ValueError(f"{model_dir} lacks weights of its Llama: {missing}")
        # SGLang loads the tower in fp16, then scripts/cpu_stand_in casts it to the dtype of the
        # server.
        tower = CLIPVisionModel.from_pretrained(self.config["mm_vision_tower"], dtype=torch.float16)
        self.tower = tower.float().eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self.image_processor = AutoImageProcessor.from_pretrained(model_dir)

    def prompt(self, messages: list[Message]) -> LlavaPrompt:
        ids, images = render(self.tokenizer, messages)
        is_padded = any(part.get("modalities") == "multi-images" for part in images)
        return LlavaPrompt(self, ids, [as_picture(part) for part in images], is_padded)

    def embed_token(self, token_id: int) -> torch.Tensor:
        return self.model.get_input_embeddings()(torch.tensor([token_id]))

    def forward(
        self, embeds: torch.Tensor, rope_positions: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        hidden = self.model.model(
            inputs_embeds=embeds[None],
            position_ids=rope_positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self.model.lm_head(hidden[0, -1])

    def pixels(self, picture: Image.Image, is_padded: bool) -> np.ndarray:
        """fp16 tiles [t, 3, side, side] of one image; t = 1 when it is padded to a square."""
        host = host_functions()
        if is_padded:
            background = tuple(int(channel * 255) for channel in self.image_processor.image_mean)
            tiles = self.image_processor(host.expand2square(picture, background))["pixel_values"]
        else:
            tiles = host.process_anyres_image(
                picture, self.image_processor, self.config["image_grid_pinpoints"]
            )
        return np.asarray(tiles, dtype=np.float16)

    @torch.inference_mode()
    def features(self, tiles: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
        """Embeddings [n, hidden] of one image of ``size`` (width, height) pixels, row separators
        included."""
        layer = self.config["mm_vision_select_layer"]
        hidden = self.tower(
            torch.from_numpy(tiles).float(), output_hidden_states=True
        ).hidden_states[layer][:, 1:]
        weight, bias, second_weight, second_bias = self._projector
        features = torch.nn.functional.gelu(torch.nn.functional.linear(hidden, weight, bias))
        # [t, side * side, hidden]
        features = torch.nn.functional.linear(features, second_weight, second_bias)
        if len(features) == 1:
            return torch.cat([features[0], self.newline[None]])
        host = host_functions()
        side = self.tower.config.image_size // self.tower.config.patch_size
        columns, rows = host.get_anyres_image_grid_shape(
            size, self.config["image_grid_pinpoints"], self.tower.config.image_size
        )
        grid = features[1:].view(rows, columns, side, side, -1).permute(4, 0, 2, 1, 3)
        grid = host.unpad_image(grid.flatten(1, 2).flatten(2, 3), size)  # [hidden, height, width]
        ends = self.newline[:, None, None].expand(-1, grid.shape[1], 1)
        return torch.cat([features[0], torch.cat([grid, ends], dim=-1).flatten(1).T])


class LlavaPrompt:
    def __init__(
        self,
        backbone: LlavaBackbone,
        template_ids: list[int],
        pictures: list[Image.Image],
        is_padded: bool,
    ) -> None:
        if len(pictures) > 16:
            raise NotImplementedError(
                f"SGLang pools the features of more than 16 images, got {len(pictures)}"
            )
        if len(pictures) > 1 and not is_padded:
            raise ValueError(
                'SGLang drops all images but the first unless the parts say "modalities": '
                '"multi-images"'
            )
        tiles = [backbone.pixels(picture, is_padded) for picture in pictures]
        self._features = [
            backbone.features(t, picture.size) for t, picture in zip(tiles, pictures, strict=True)
        ]
        # SGLang counts no separator for an image of one tile, though its embeddings end in one: see
        # embed().
        lengths = [
            len(feature) - (len(t) == 1) for t, feature in zip(tiles, self._features, strict=True)
        ]
        image_token = backbone.config["image_token_index"]
        self.ids = expand_images(template_ids, image_token, [pad_id(t) for t in tiles], lengths)
        self._backbone = backbone

    @torch.inference_mode()
    def embed(self, start: int, end: int) -> torch.Tensor:
        """As SGLang packs them: the separator after an image of one tile lands on the text token
        behind it, unless an earlier forward has computed the image's last token."""
        ids = torch.tensor(self.ids[start:end])
        embeds = self._backbone.model.get_input_embeddings()(ids.where(ids < FIRST_PAD_ID, 0))
        for (image_start, image_end), feature in zip(
            image_spans(self.ids), self._features, strict=False
        ):
            if start < image_end and image_start < end:
                low, high = max(start, image_start), min(end, image_start + len(feature))
                embeds[low - start : high - start] = feature[low - image_start : high - image_start]
        return embeds

    def rope_positions(self, start: int, end: int) -> torch.Tensor:
        return torch.arange(start, end)[None]


class LlavaNextBackbone:
    """LLaVA-NeXT in the Hugging Face layout, as Transformers has it."""

    def __init__(self, model_dir: Path | str) -> None:
        from transformers import LlavaNextForConditionalGeneration

        self.model = LlavaNextForConditionalGeneration.from_pretrained(
            model_dir, dtype=torch.float32
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self.image_processor = AutoImageProcessor.from_pretrained(model_dir)

    def prompt(self, messages: list[Message]) -> LlavaNextPrompt:
        ids, images = render(self.tokenizer, messages)
        return LlavaNextPrompt(self, ids, [as_picture(part) for part in images])

    def embed_token(self, token_id: int) -> torch.Tensor:
        return self.model.get_input_embeddings()(torch.tensor([token_id]))

    def forward(
        self, embeds: torch.Tensor, rope_positions: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        hidden = self.model.model.language_model(
            inputs_embeds=embeds[None],
            position_ids=rope_positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self.model.lm_head(hidden[0, -1])


class LlavaNextPrompt:
    @torch.inference_mode()
    def __init__(
        self, backbone: LlavaNextBackbone, template_ids: list[int], pictures: list[Image.Image]
    ) -> None:
        self._embeds, self.ids = backbone.model.get_input_embeddings(), template_ids
        self._features: list[torch.Tensor] = []
        self.sizes: list[tuple[int, int]] = []  # of the pictures, (height, width)
        if pictures:
            pixels = backbone.image_processor(images=pictures, return_tensors="pt")
            self.pixels = pixels["pixel_values"]
            self.sizes = [tuple(size) for size in pixels["image_sizes"].tolist()]
            config = backbone.model.config
            self._features = backbone.model.model.get_image_features(
                **pixels,
                vision_feature_layer=config.vision_feature_layer,
                vision_feature_select_strategy=config.vision_feature_select_strategy,
            ).pooler_output
            pad_ids = [pad_id(tiles.numpy()) for tiles in pixels["pixel_values"]]
            lengths = [len(feature) for feature in self._features]
            self.ids = expand_images(template_ids, config.image_token_id, pad_ids, lengths)

    @torch.inference_mode()
    def embed(self, start: int, end: int) -> torch.Tensor:
        ids = torch.tensor(self.ids)
        embeds = self._embeds(ids.where(ids < FIRST_PAD_ID, 0))
        if self._features:
            embeds[ids >= FIRST_PAD_ID] = torch.cat(list(self._features))
        return embeds[start:end]

    def rope_positions(self, start: int, end: int) -> torch.Tensor:
        return torch.arange(start, end)[None]


def host_functions() -> Any:
    """SGLang's picture helpers. Imported late, so that a Qwen oracle needs no SGLang."""
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    from sglang.srt.multimodal import mm_utils

    return mm_utils


def render(tokenizer, messages: list[Message]) -> tuple[list[int], list[Message]]:
    """Token ids of the conversation with one image token per image, and its image parts in
    order."""
    images: list[Message] = []
    plain = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            images += [part for part in content if part["type"] != "text"]
            content = [part if part["type"] == "text" else {"type": "image"} for part in content]
        plain.append({"role": message["role"], "content": content})
    text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False), images


def as_picture(part: Message) -> Image.Image:
    if part["type"] == "image":
        return part["image"].convert("RGB")
    encoded = part["image_url"]["url"].partition("base64,")[2]
    return Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")


def expand_images(
    ids: list[int], image_token: int, pad_ids: list[int], lengths: list[int]
) -> list[int]:
    """``ids`` with the i-th image token as ``lengths[i]`` times ``pad_ids[i]``."""
    images = iter(zip(pad_ids, lengths, strict=True))
    expanded: list[int] = []
    for token in ids:
        if token == image_token:
            pad, length = next(images)
            expanded += [pad] * length
        else:
            expanded.append(token)
    if next(images, None) is not None:
        raise ValueError("the chat template shows fewer images than the messages hold")
    return expanded


def pad_id(pixels: np.ndarray) -> int:
    return FIRST_PAD_ID + zlib.crc32(np.ascontiguousarray(pixels).tobytes())


def image_spans(ids: list[int]) -> list[tuple[int, int]]:
    """Positions [start, end) of each image."""
    spans, start = [], 0
    for token, group in groupby(ids):
        end = start + sum(1 for _ in group)
        if token >= FIRST_PAD_ID:
            spans.append((start, end))
        start = end
    return spans


def common_prefix(a: list[int], b: list[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
