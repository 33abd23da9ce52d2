"""Write a tiny vision-language model with random weights: real architecture, offline, a few MB.

    python scripts/make_tiny_model.py OUT/tiny-qwen2.5-vl --backbone qwen2_5_vl
    python scripts/make_tiny_model.py OUT/tiny-llava-next --backbone llava_next
    python scripts/make_tiny_model.py OUT/tiny-llava-next-hf --backbone llava_next_hf

Keep these directory names: SGLang picks the chat template of frontend programs from the path
(`qwen.*vl` for Qwen; LLaVA takes the default template, whose image token is `<image>`).

- qwen2_5_vl: Qwen2_5_VLForConditionalGeneration with M-RoPE; one visual token per 28 x 28 pixels.
- llava_next: the original LLaVA-1.6 layout (LlavaLlamaForCausalLM, anyres, spatial_unpad) with its
  CLIP tower in a sub-directory. A square image is 520 visual tokens; 100 when a request holds several
  images, since SGLang then pads each one instead. config.json names the tower by absolute path:
  make the directory again after moving it.
- llava_next_hf, llava_next_hf_mistral, llava_next_hf_qwen2: LLaVA-NeXT in the Hugging Face layout with the three
  text backbones that published checkpoints have.

All have 4 query heads, 2 KV heads and head_dim 128. Answers are lists of common words: the output head
is zero but for one peaked row per word, so the greedy choice has a clear margin, a text is cut into the
same tokens when it comes back in the next turn, and no end token is ever chosen.
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

DEFAULT_NAMES = {
    "qwen2_5_vl": "tiny-qwen2.5-vl",
    "llava_next": "tiny-llava-next",
    "llava_next_hf": "tiny-llava-next-hf",
    "llava_next_hf_mistral": "tiny-llava-next-hf-mistral",
    "llava_next_hf_qwen2": "tiny-llava-next-hf-qwen2",
}

HEAD_DIM, NUM_QO_HEADS, NUM_KV_HEADS = 128, 4, 2
HIDDEN_SIZE = HEAD_DIM * NUM_QO_HEADS
VOCAB_SIZE = 1024
# Logits have this standard deviation; the best word then leads by about 2, far above bf16 noise.
HEAD_SCALE = 6.0
# Random queries and keys score near 0 against each other. Scaled up, attention picks out tokens, and
# the answer depends on what the keys of an image hold.
QUERY_KEY_SCALE = 1.5
# Real checkpoints have keys with a mean; a zero bias would hide a mean that is lost on the way.
QUERY_KEY_BIAS = 0.5

QWEN_SPECIALS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
LLAVA_SPECIALS = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]

LLAVA_IMAGE_SIZE, LLAVA_PATCH_SIZE, LLAVA_TOWER_SIZE = 140, 14, 64
LLAVA_PINPOINTS = [[140, 280], [280, 140], [280, 280]]

WORDS = (
    "a the and or in on at of to is are it this that two three four five red green blue yellow white black "
    "orange purple grey dark bright small large round square circle triangle line star box word text picture "
    "image page chart table map street house tree river sky sun moon cloud bird cat dog boat car train left "
    "right top bottom middle corner above below behind near with without one many few some shows holds says"
).split()
SENTENCES = [
    "You are a helpful assistant.",
    "What is in this picture?",
    "Describe the image in one sentence.",
    "Which colour is the largest shape?",
    "Here is a second picture. What has changed?",
    "system user assistant USER: ASSISTANT:",
]

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
{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}"""


def make_tokenizer(out: Path, specials: list[str], chat_template: str, **token_roles: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which each of WORDS (with its leading space) is one token; save it to `out`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        show_progress=False,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([" " + " ".join(WORDS), *SENTENCES], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, additional_special_tokens=specials, **token_roles)
    tokenizer.chat_template = chat_template
    tokenizer.model_max_length = 32768
    tokenizer.save_pretrained(out)
    return tokenizer


@torch.no_grad()
def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Fill matrices so that unit-variance inputs give unit-variance outputs; norms keep their ones."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            fan_in = parameter[0].numel()
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)


@torch.no_grad()
def sharpen(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, generator: torch.Generator) -> None:
    """Make attention selective and greedy decoding stable (see the module docstring)."""
    for name, parameter in model.named_parameters():
        if "visual" in name or "vision_tower" in name:
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.mul_(QUERY_KEY_SCALE)
        elif name.endswith(("q_proj.bias", "k_proj.bias")):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * QUERY_KEY_BIAS)
    answers = torch.zeros(VOCAB_SIZE, 1, dtype=model.lm_head.weight.dtype)
    answers[tokenizer.convert_tokens_to_ids([f"Ġ{word}" for word in WORDS])] = HEAD_SCALE
    model.lm_head.weight.mul_(answers)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def make_qwen2_5_vl(out: Path, layers: int, generator: torch.Generator) -> None:
    tokenizer = make_tokenizer(
        out, QWEN_SPECIALS, QWEN_CHAT_TEMPLATE, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in QWEN_SPECIALS}
    text_config = dict(
        model_type="qwen2_5_vl_text",
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=NUM_QO_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
        tie_word_embeddings=False,
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
    )
    vision_config = dict(
        model_type="qwen2_5_vl",
        depth=2,
        hidden_size=128,
        intermediate_size=256,
        num_heads=2,
        in_channels=3,
        in_chans=3,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=112,
        fullatt_block_indexes=[1],
        out_hidden_size=HIDDEN_SIZE,
        tokens_per_second=2,
        hidden_act="silu",
    )
    config = Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        tie_word_embeddings=False,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    model = Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)
    randomise(model, generator)
    sharpen(model, tokenizer, generator)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.do_sample = False
    model.save_pretrained(out)
    write_json(
        out / "preprocessor_config.json",
        {
            "processor_class": "Qwen2_5_VLProcessor",
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": 56 * 56,
            "max_pixels": 1280 * 28 * 28,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.25, 0.25, 0.25],
        },
    )


def make_llava_next(out: Path, layers: int, generator: torch.Generator) -> None:
    tokenizer = make_tokenizer(
        out,
        LLAVA_SPECIALS,
        LLAVA_CHAT_TEMPLATE,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in LLAVA_SPECIALS}
    text_config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=NUM_QO_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=8192,
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        pad_token_id=ids["<pad>"],
    )
    language_model = LlamaForCausalLM(text_config).to(torch.bfloat16)
    randomise(language_model, generator)
    sharpen(language_model, tokenizer, generator)
    weights = {name: tensor.contiguous() for name, tensor in language_model.state_dict().items()}
    weights |= llava_connector_weights(generator)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})

    # SGLang chooses the tower's class by the word "clip" in this path.
    tower_path = out / "clip-vision-tower"
    vision_config = make_clip_tower(tower_path, generator)
    write_llava_config(out, tower_path, text_config, vision_config, ids["<image>"])


def llava_connector_weights(generator: torch.Generator) -> dict[str, torch.Tensor]:
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


def clip_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=LLAVA_TOWER_SIZE,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=LLAVA_IMAGE_SIZE,
        patch_size=LLAVA_PATCH_SIZE,
        projection_dim=LLAVA_TOWER_SIZE,
    )


def make_clip_tower(path: Path, generator: torch.Generator) -> CLIPVisionConfig:
    config = clip_config()
    tower = CLIPVisionModel(config)
    randomise(tower, generator)
    tower.half().save_pretrained(path)
    return config


def write_llava_config(
    out: Path, tower_path: Path, text_config: LlamaConfig, vision_config: CLIPVisionConfig, image_token_id: int
) -> None:
    config = text_config.to_dict()
    config.pop("head_dim")
    config |= {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "image_token_index": image_token_id,
        "image_token_id": image_token_id,
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": LLAVA_PINPOINTS,
        "mm_vision_tower": str(tower_path),
        "mm_hidden_size": LLAVA_TOWER_SIZE,
        "mm_projector_type": "mlp2x_gelu",
        "projector_hidden_act": "gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "spatial_unpad",
        "text_config": text_config.to_dict(),
        "vision_config": vision_config.to_dict(),
    }
    write_json(out / "config.json", config)
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": LLAVA_IMAGE_SIZE},
        crop_size={"height": LLAVA_IMAGE_SIZE, "width": LLAVA_IMAGE_SIZE},
    )
    write_json(
        out / "preprocessor_config.json",
        image_processor.to_dict() | {"processor_class": "LlavaProcessor", "image_processor_type": "CLIPImageProcessor"},
    )
    write_json(
        out / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "patch_size": LLAVA_PATCH_SIZE,
            "vision_feature_select_strategy": "default",
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
        },
    )


def make_llava_next_hf(
    out: Path, layers: int, generator: torch.Generator, text_config_class: type[PreTrainedConfig] = LlamaConfig
) -> None:
    tokenizer = make_tokenizer(
        out,
        LLAVA_SPECIALS,
        LLAVA_CHAT_TEMPLATE,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in LLAVA_SPECIALS}
    text_config = text_config_class(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=NUM_QO_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        pad_token_id=ids["<pad>"],
    )
    config = LlavaNextConfig(
        text_config=text_config,
        vision_config=clip_config(),
        tie_word_embeddings=False,
        image_token_index=ids["<image>"],
        image_grid_pinpoints=LLAVA_PINPOINTS,
    )
    model = LlavaNextForConditionalGeneration(config).to(torch.bfloat16)
    randomise(model, generator)
    model.model.image_newline.data = torch.randn(HIDDEN_SIZE, generator=generator).to(torch.bfloat16)
    sharpen(model, tokenizer, generator)
    model.generation_config.do_sample = False
    model.save_pretrained(out)
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": LLAVA_IMAGE_SIZE},
        crop_size={"height": LLAVA_IMAGE_SIZE, "width": LLAVA_IMAGE_SIZE},
        image_grid_pinpoints=LLAVA_PINPOINTS,
    )
    write_json(out / "preprocessor_config.json", image_processor.to_dict() | {"processor_class": "LlavaNextProcessor"})


MAKERS = {
    "qwen2_5_vl": make_qwen2_5_vl,
    "llava_next": make_llava_next,
    "llava_next_hf": make_llava_next_hf,
    "llava_next_hf_mistral": partial(make_llava_next_hf, text_config_class=MistralConfig),
    "llava_next_hf_qwen2": partial(make_llava_next_hf, text_config_class=Qwen2Config),
}


def make_model(out: Path, backbone: str, layers: int = 2, seed: int = 0) -> Path:
    """Write the model directory `out` (made if missing, files overwritten) and return its absolute path."""
    if backbone not in MAKERS:
        raise ValueError(f"backbone is {backbone!r}, expected one of {', '.join(MAKERS)}")
    out = Path(out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    transformers_logging.disable_progress_bar()
    # Some vectors keep what the model's constructor drew for them from the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        MAKERS[backbone](out, layers, torch.Generator().manual_seed(seed))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write, e.g. models/tiny-qwen2.5-vl")
    parser.add_argument("--backbone", choices=sorted(MAKERS), required=True)
    parser.add_argument("--layers", type=int, default=2, help="decoder layers (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default 0)")
    arguments = parser.parse_args()
    out = make_model(arguments.out, arguments.backbone, arguments.layers, arguments.seed)
    print(f"wrote {out} ({sum(f.stat().st_size for f in out.rglob('*') if f.is_file()) / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
