"""Write a checkpoint directory of a real model's shapes without weights: config, tokenizer,
processor, chat template.

    python scripts/models/make_full_size_config.py OUT/qwen2.5-vl-7b --model qwen2.5-vl-7b
    python -m sglang.launch_server --model-path OUT/qwen2.5-vl-7b --load-format dummy ...

- qwen2.5-vl-7b: Qwen/Qwen2.5-VL-7B-Instruct. A 980 x 980 picture is 1225 visual tokens.
- llava-next-8b: llava-hf/llama3-llava-next-8b-hf (Llama-3-8B, CLIP-L/14-336). A 672 x 672 picture
  is five tiles and 2928 visual tokens: 5 x 576 and one separator for each of 48 rows.

Shapes are the published ones; nothing is downloaded. Tokenizer and chat template are those of
make_tiny_model.py, with special tokens at other ids than in the real checkpoints. Every id of the
real vocabulary has a word of its own: whatever random weights choose is text, and becomes the same
token again when it comes back in the next turn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import string
from pathlib import Path

from architectures import (
    LLAVA_CHAT_TEMPLATE,
    LLAVA_ROLES,
    LLAVA_SPECIALS,
    QWEN2_5_VISION,
    QWEN_CHAT_TEMPLATE,
    QWEN_ROLES,
    QWEN_SPECIALS,
    llava_next_config,
    llava_processor,
    llava_text_config,
    mrope,
    qwen_config,
    qwen_processor,
    write_json,
)
from tiny_models.tokenizer import make_tokenizer
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextImageProcessor,
    PreTrainedConfig,
)

LLAVA_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def fill_vocabulary(out: Path, vocab_size: int) -> None:
    """Give every id up to ``vocab_size`` a word of four letters in the tokenizer of ``out``."""
    path = out / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    next_id = 1 + max([*vocabulary.values(), *(token["id"] for token in tokenizer["added_tokens"])])
    for letters in itertools.product(string.ascii_lowercase, repeat=4):
        if next_id == vocab_size:
            break
        # With its leading space, as the byte-level alphabet writes it.
        word = "Ġ" + "".join(letters)
        if word not in vocabulary:
            vocabulary[word] = next_id
            next_id += 1
    # No merges lead to these words: a word of the vocabulary is taken as it is.
    tokenizer["model"]["ignore_merges"] = True
    path.write_text(json.dumps(tokenizer, ensure_ascii=False))


def save_config(out: Path, config: PreTrainedConfig, architecture: str) -> None:
    config.architectures = [architecture]
    config.dtype = "bfloat16"
    config.save_pretrained(out)


def make_qwen2_5_vl_7b(out: Path) -> None:
    tokenizer = make_tokenizer(out, QWEN_SPECIALS, QWEN_CHAT_TEMPLATE, **QWEN_ROLES)
    text = dict(
        model_type="qwen2_5_vl_text",
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=128000,
        use_sliding_window=False,
        **mrope(1e6),
    )
    vision = dict(
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        fullatt_block_indexes=[7, 15, 23, 31],
        out_hidden_size=3584,
        **QWEN2_5_VISION,
    )
    save_config(out, qwen_config(tokenizer, text, vision), "Qwen2_5_VLForConditionalGeneration")
    fill_vocabulary(out, text["vocab_size"])
    processor = qwen_processor("Qwen2_5_VLProcessor", 3136, 12845056, CLIP_MEAN, CLIP_STD)
    write_json(out / "preprocessor_config.json", processor)


def make_llava_next_8b(out: Path) -> None:
    tokenizer = make_tokenizer(out, LLAVA_SPECIALS, LLAVA_CHAT_TEMPLATE, **LLAVA_ROLES)
    text = dict(
        vocab_size=128320,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
    )
    text_config = llava_text_config(tokenizer, LlamaConfig, text)
    vision_config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    config = llava_next_config(tokenizer, text_config, vision_config, LLAVA_PINPOINTS)
    save_config(out, config, "LlavaNextForConditionalGeneration")
    fill_vocabulary(out, text["vocab_size"])
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        image_grid_pinpoints=LLAVA_PINPOINTS,
    )
    write_json(
        out / "preprocessor_config.json",
        image_processor.to_dict() | {"processor_class": "LlavaNextProcessor"},
    )
    write_json(out / "processor_config.json", llava_processor("LlavaNextProcessor", patch_size=14))


MAKERS = {"qwen2.5-vl-7b": make_qwen2_5_vl_7b, "llava-next-8b": make_llava_next_8b}


def make_config(out: Path, model: str) -> Path:
    """Write the directory ``out`` (made if missing, files overwritten) and return its absolute
    path."""
    out = Path(out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    MAKERS[model](out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "out",
        type=Path,
        help="directory to write; name it after the model, SGLang looks at the name",
    )
    parser.add_argument("--model", choices=sorted(MAKERS), required=True)
    arguments = parser.parse_args()
    print(
        f"wrote {make_config(arguments.out, arguments.model)} (no weights: start the server with "
        "--load-format dummy)"
    )


if __name__ == "__main__":
    main()
