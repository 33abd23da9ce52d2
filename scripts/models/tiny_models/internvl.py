"""InternVL3 in its original layout (``InternVLChatModel`` with a Qwen2 decoder), whose classes
SGLang brings.

Its published code is fetched with the checkpoint; configuration and weights are written here by
name.
"""

from __future__ import annotations

from pathlib import Path

import torch
from architectures import QWEN_CHAT_TEMPLATE, QWEN_ROLES, QWEN_SPECIALS, write_json
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from .decoder import HIDDEN_SIZE, decoder_shape, randomise, sharpen
from .tokenizer import make_tokenizer

INTERNVL_SPECIALS = [*QWEN_SPECIALS, "<img>", "</img>", "<IMG_CONTEXT>"]
# SGLang cuts pictures into tiles of 448 x 448 px, whatever the configuration says. Patches of 56 px
# leave 16 tokens a tile, so a square picture, nine tiles and a thumbnail, is 160 tokens.
TILE_SIZE, PATCH_SIZE = 448, 56
VISION_SIZE, VISION_LAYERS, VISION_INNER_SIZE = 64, 2, 128


def make_internvl3(out: Path, layers: int, generator: torch.Generator) -> None:
    tokenizer = make_tokenizer(out, INTERNVL_SPECIALS, QWEN_CHAT_TEMPLATE, **QWEN_ROLES)
    text_config = Qwen2Config(
        **decoder_shape(layers),
        max_position_embeddings=32768,
        rope_theta=1e6,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        architectures=["Qwen2ForCausalLM"],
    )
    language_model = Qwen2ForCausalLM(text_config).to(torch.bfloat16)
    randomise(language_model, generator)
    sharpen(language_model, tokenizer, generator)
    weights = {
        f"language_model.{name}": tensor.contiguous()
        for name, tensor in language_model.state_dict().items()
    }
    weights |= vision_weights(generator)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", config_of(text_config))
    # As published; SGLang's processor cuts and normalizes pictures by itself.
    write_json(
        out / "preprocessor_config.json",
        {
            "crop_size": TILE_SIZE,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "resample": 3,
            "size": TILE_SIZE,
        },
    )


def vision_weights(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Vision tower and connector under the names of published checkpoints, bfloat16."""

    def random(*shape: int) -> torch.Tensor:
        fan_in = torch.Size(shape[1:]).numel()
        return (torch.randn(*shape, generator=generator) * fan_in**-0.5).to(torch.bfloat16)

    def linear(name: str, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
        return {
            f"{name}.weight": random(outputs, inputs),
            f"{name}.bias": random(outputs, 1).flatten() * 0.1,
        }

    def norm(name: str, size: int) -> dict[str, torch.Tensor]:
        return {
            f"{name}.weight": torch.ones(size).bfloat16(),
            f"{name}.bias": torch.zeros(size).bfloat16(),
        }

    patches = (TILE_SIZE // PATCH_SIZE) ** 2
    embeddings = "vision_model.embeddings"
    weights = {
        f"{embeddings}.class_embedding": random(1, 1, VISION_SIZE),
        f"{embeddings}.position_embedding": random(1, 1 + patches, VISION_SIZE),
        f"{embeddings}.patch_embedding.weight": random(VISION_SIZE, 3, PATCH_SIZE, PATCH_SIZE),
        f"{embeddings}.patch_embedding.bias": torch.zeros(VISION_SIZE).bfloat16(),
    }
    for layer in range(VISION_LAYERS):
        name = f"vision_model.encoder.layers.{layer}"
        weights |= linear(f"{name}.attn.qkv", 3 * VISION_SIZE, VISION_SIZE)
        weights |= linear(f"{name}.attn.proj", VISION_SIZE, VISION_SIZE)
        weights |= linear(f"{name}.mlp.fc1", VISION_INNER_SIZE, VISION_SIZE)
        weights |= linear(f"{name}.mlp.fc2", VISION_SIZE, VISION_INNER_SIZE)
        weights |= norm(f"{name}.norm1", VISION_SIZE) | norm(f"{name}.norm2", VISION_SIZE)
        weights |= {
            f"{name}.{scale}": torch.ones(VISION_SIZE).bfloat16() for scale in ("ls1", "ls2")
        }
    shuffled = 4 * VISION_SIZE  # the channels of 2 x 2 patches
    return (
        weights
        | norm("mlp1.0", shuffled)
        | linear("mlp1.1", HIDDEN_SIZE, shuffled)
        | linear("mlp1.3", HIDDEN_SIZE, HIDDEN_SIZE)
    )


def config_of(text_config: Qwen2Config) -> dict:
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": TILE_SIZE,
        "llm_config": text_config.to_dict(),
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "hidden_act": "gelu",
            "hidden_size": VISION_SIZE,
            "image_size": TILE_SIZE,
            "intermediate_size": VISION_INNER_SIZE,
            "norm_type": "layer_norm",
            "num_attention_heads": 2,
            "num_hidden_layers": VISION_LAYERS,
            "patch_size": PATCH_SIZE,
            "qk_normalization": False,
            "qkv_bias": True,
        },
    }
