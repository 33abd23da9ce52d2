"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL, as Transformers writes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from architectures import (
    PATCHES,
    QWEN2_5_VISION,
    QWEN_CHAT_TEMPLATE,
    QWEN_ROLES,
    QWEN_SPECIALS,
    mrope,
    qwen_config,
    qwen_processor,
    write_json,
)
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from .decoder import HIDDEN_SIZE, decoder_shape, randomise, sharpen
from .tokenizer import make_tokenizer


@dataclass(frozen=True)
class QwenVL:
    """What tells one generation from another."""

    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    processor: str
    text_config: dict[str, Any]
    vision_config: dict[str, Any]


QWEN2_VL = QwenVL(
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    "Qwen2VLProcessor",
    dict(model_type="qwen2_vl_text", **mrope(1e6)),
    dict(
        model_type="qwen2_vl",
        depth=2,
        embed_dim=128,
        hidden_size=HIDDEN_SIZE,
        num_heads=2,
        mlp_ratio=2,
        **PATCHES,
    ),
)
QWEN2_5_VL = QwenVL(
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    "Qwen2_5_VLProcessor",
    dict(model_type="qwen2_5_vl_text", **mrope(1e6)),
    dict(
        depth=2,
        hidden_size=128,
        intermediate_size=256,
        num_heads=2,
        fullatt_block_indexes=[1],
        out_hidden_size=HIDDEN_SIZE,
        **QWEN2_5_VISION,
    ),
)
QWEN3_VL = QwenVL(
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    "Qwen3VLProcessor",
    dict(
        model_type="qwen3_vl_text",
        rope_parameters=dict(
            rope_type="default", rope_theta=5e6, mrope_section=[24, 20, 20], mrope_interleaved=True
        ),
    ),
    dict(
        model_type="qwen3_vl",
        depth=3,
        hidden_size=128,
        intermediate_size=256,
        num_heads=2,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1],  # decoder layers 0 and 1 get features of their own
        out_hidden_size=HIDDEN_SIZE,
        **(PATCHES | dict(patch_size=16)),
    ),
)


SHARED_WITH_VIDEOS = (
    "processor_class", "patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std",
)  # fmt: skip


def make_qwen_vl(out: Path, layers: int, generator: torch.Generator, generation: QwenVL) -> None:
    tokenizer = make_tokenizer(out, QWEN_SPECIALS, QWEN_CHAT_TEMPLATE, **QWEN_ROLES)
    text = decoder_shape(layers) | generation.text_config | dict(max_position_embeddings=32768)
    config = qwen_config(
        tokenizer, text, generation.vision_config, config_class=generation.config_class
    )
    model = generation.model_class(config).to(torch.bfloat16)
    randomise(model, generator)
    sharpen(model, tokenizer, generator)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.do_sample = False
    model.save_pretrained(out)
    write_processor(out, generation)


def write_processor(out: Path, generation: QwenVL) -> None:
    patch_size = generation.vision_config["patch_size"]
    token_pixels = (2 * patch_size) ** 2
    images = qwen_processor(
        generation.processor,
        4 * token_pixels,
        1280 * token_pixels,
        mean=[0.5, 0.5, 0.5],
        std=[0.25, 0.25, 0.25],
        patch_size=patch_size,
    )
    write_json(out / "preprocessor_config.json", images)
    video_processor = "Qwen3VLVideoProcessor" if generation is QWEN3_VL else "Qwen2VLVideoProcessor"
    write_json(
        out / "video_preprocessor_config.json",
        {name: images[name] for name in SHARED_WITH_VIDEOS}
        | {
            "video_processor_type": video_processor,
            "size": {"shortest_edge": 4 * token_pixels, "longest_edge": 1280 * token_pixels},
        },
    )
