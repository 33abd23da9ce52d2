"""LLaVA-NeXT in the Hugging Face layout, with the text backbones that published checkpoints
have."""

from __future__ import annotations

from pathlib import Path

import torch
from architectures import llava_next_config, llava_text_config, write_json
from transformers import (
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    PreTrainedConfig,
)

from .decoder import HIDDEN_SIZE, decoder_shape, randomise, sharpen
from .llava import (
    LLAVA_IMAGE_SIZE,
    LLAVA_PINPOINTS,
    SQUARE,
    clip_config,
    make_llava_tokenizer,
)


def make_llava_next_hf(
    out: Path, layers: int, generator: torch.Generator, text_config_class: type[PreTrainedConfig]
) -> None:
    tokenizer = make_llava_tokenizer(out)
    text_config = llava_text_config(tokenizer, text_config_class, decoder_shape(layers))
    config = llava_next_config(tokenizer, text_config, clip_config(), LLAVA_PINPOINTS)
    model = LlavaNextForConditionalGeneration(config).to(torch.bfloat16)
    randomise(model, generator)
    model.model.image_newline.data = torch.randn(HIDDEN_SIZE, generator=generator).to(
        torch.bfloat16
    )
    sharpen(model, tokenizer, generator)
    model.generation_config.do_sample = False
    model.save_pretrained(out)
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": LLAVA_IMAGE_SIZE},
        crop_size=SQUARE,
        image_grid_pinpoints=LLAVA_PINPOINTS,
    )
    write_json(
        out / "preprocessor_config.json",
        image_processor.to_dict() | {"processor_class": "LlavaNextProcessor"},
    )
