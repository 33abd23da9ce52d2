"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL, as Transformers writes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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

from . import write_json
from .decoder import HIDDEN_SIZE, decoder_shape, randomise, sharpen
from .tokenizer import make_tokenizer

QWEN_SPECIALS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip

QWEN_CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}{{ '\\n' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] in ('video', 'video_url') -%}<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}{{ part['text'] }}
{%- endif -%}{%- endfor -%}{%- endif -%}
<|im_end|>{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\\n' }}{%- endif -%}"""


@dataclass(frozen=True)
class QwenVL:
    """What tells one generation from another."""

    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    processor: str
    text_config: dict[str, Any]
    vision_config: dict[str, Any]


MROPE = dict(rope_theta=1e6, rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]})
PATCHES = dict(
    in_channels=3, in_chans=3, patch_size=14, spatial_merge_size=2, temporal_patch_size=2
)

QWEN2_VL = QwenVL(
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    "Qwen2VLProcessor",
    dict(model_type="qwen2_vl_text", **MROPE),
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
    dict(model_type="qwen2_5_vl_text", **MROPE),
    dict(
        model_type="qwen2_5_vl",
        depth=2,
        hidden_size=128,
        intermediate_size=256,
        num_heads=2,
        window_size=112,
        fullatt_block_indexes=[1],
        out_hidden_size=HIDDEN_SIZE,
        tokens_per_second=2,
        hidden_act="silu",
        **PATCHES,
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


def make_qwen_vl(out: Path, layers: int, generator: torch.Generator, generation: QwenVL) -> None:
    tokenizer = make_tokenizer(
        out, QWEN_SPECIALS, QWEN_CHAT_TEMPLATE, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in QWEN_SPECIALS}
    text_config = dict(
        **decoder_shape(layers),
        **generation.text_config,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
    )
    config = generation.config_class(
        text_config=text_config,
        vision_config=generation.vision_config,
        tie_word_embeddings=False,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    model = generation.model_class(config).to(torch.bfloat16)
    randomise(model, generator)
    sharpen(model, tokenizer, generator)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.do_sample = False
    model.save_pretrained(out)
    write_processor(out, generation)


def write_processor(out: Path, generation: QwenVL) -> None:
    patch_size = generation.vision_config["patch_size"]
    token_pixels = (2 * patch_size) ** 2
    shared = {
        "processor_class": generation.processor,
        "patch_size": patch_size,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
    }
    write_json(
        out / "preprocessor_config.json",
        shared
        | {
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": 4 * token_pixels,
            "max_pixels": 1280 * token_pixels,
        },
    )
    video_processor = "Qwen3VLVideoProcessor" if generation is QWEN3_VL else "Qwen2VLVideoProcessor"
    write_json(
        out / "video_preprocessor_config.json",
        shared
        | {
            "video_processor_type": video_processor,
            "size": {"shortest_edge": 4 * token_pixels, "longest_edge": 1280 * token_pixels},
        },
    )
