"""Qwen-VL and LLaVA-NeXT as every model of this folder has them, tiny, trained or of full size:
special tokens, chat templates, and what their configurations and processors have in common.

A size gives the shapes of its text and vision parts, as dictionaries or configurations.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
)

QWEN_SPECIALS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
QWEN_ROLES = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
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

LLAVA_SPECIALS = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
LLAVA_ROLES = {
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
}  # fmt: skip
LLAVA_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}USER: {% elif message['role'] == 'assistant' -%}ASSISTANT:{% endif -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}<image>{{ '\\n' }}
{%- elif part['type'] == 'text' -%}{{ part['text'] }}
{%- endif -%}{%- endfor -%}{%- endif -%}
{%- if message['role'] == 'assistant' -%}</s>{%- else -%}{{ ' ' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}"""  # noqa: E501

MROPE_SECTION = [16, 24, 24]  # of head_dim 128
PATCHES = dict(
    in_channels=3, in_chans=3, patch_size=14, spatial_merge_size=2, temporal_patch_size=2
)
QWEN2_5_VISION = dict(
    model_type="qwen2_5_vl", window_size=112, tokens_per_second=2, hidden_act="silu", **PATCHES
)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def mrope(theta: float) -> dict[str, Any]:
    return dict(
        rope_theta=theta, rope_scaling={"type": "mrope", "mrope_section": list(MROPE_SECTION)}
    )


def qwen_config(
    tokenizer: PreTrainedTokenizerFast,
    text: dict[str, Any],
    vision: dict[str, Any],
    tie_word_embeddings: bool = False,
    config_class: type[PreTrainedConfig] = Qwen2_5_VLConfig,
) -> PreTrainedConfig:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in QWEN_SPECIALS}
    text_config = dict(
        rms_norm_eps=1e-6,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
    )
    return config_class(
        text_config=text_config | text,
        vision_config=vision,
        tie_word_embeddings=tie_word_embeddings,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def qwen_processor(
    processor: str, min_pixels: int, max_pixels: int, mean: list[float], std: list[float],
    patch_size: int = 14,
) -> dict[str, Any]:  # fmt: skip
    """preprocessor_config.json of a model whose AutoProcessor is ``processor``."""
    return {
        "processor_class": processor,
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "patch_size": patch_size,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": mean,
        "image_std": std,
    }


def llava_text_config(
    tokenizer: PreTrainedTokenizerFast,
    config_class: type[PreTrainedConfig],
    shape: dict[str, Any],
    tie_word_embeddings: bool = False,
) -> PreTrainedConfig:
    return config_class(
        **({"max_position_embeddings": 8192} | shape),
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def llava_next_config(
    tokenizer: PreTrainedTokenizerFast,
    text_config: PreTrainedConfig,
    vision_config: CLIPVisionConfig,
    pinpoints: list[list[int]],
) -> LlavaNextConfig:
    return LlavaNextConfig(
        text_config=text_config,
        vision_config=vision_config,
        tie_word_embeddings=text_config.tie_word_embeddings,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def llava_processor(processor: str, patch_size: int) -> dict[str, Any]:
    """processor_config.json of a model whose AutoProcessor is ``processor``."""
    return {
        "processor_class": processor,
        "patch_size": patch_size,
        "vision_feature_select_strategy": "default",
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
    }
