"""Write a tiny vision-language model with random weights: real architecture, offline, a few MB.

    python scripts/models/make_tiny_model.py OUT/tiny-qwen2.5-vl --backbone qwen2_5_vl
    python scripts/models/make_tiny_model.py OUT/tiny-internvl3 --backbone internvl3
    python scripts/models/make_tiny_model.py OUT/tiny-llava-next --backbone llava_next

Keep the directory names of DEFAULT_NAMES: SGLang picks the chat template of frontend programs, and
of InternVL in any case, from the path (`qwen.*vl` for Qwen; LLaVA takes the default template, whose
image token is `<image>`).

- qwen2_vl, qwen2_5_vl, qwen3_vl: M-RoPE; one visual token per 28 x 28 pixels (Qwen3-VL: 32 x 32).
- internvl3: InternVLChatModel with a Qwen2 decoder; a square image is 160 visual tokens.
- llava_next, llava_onevision: the original layout (LlavaLlamaForCausalLM with CLIP,
  LlavaQwenForCausalLM with SigLIP, anyres, spatial_unpad) with the tower in a sub-directory. A
  square image is 520 visual tokens in llava_next; 100 when a request holds several images, since
  SGLang then pads each one instead.
- llava_next_hf, llava_next_hf_mistral, llava_next_hf_qwen2: LLaVA-NeXT in the Hugging Face layout
  with the three text backbones that published checkpoints have.

All have 4 query heads, 2 KV heads and head_dim 128. Answers are lists of common words: the output
head is zero but for one peaked row per word, so the greedy choice has a clear margin, a text is cut
into the same tokens when it comes back in the next turn, and no end token is ever chosen.
"""

import argparse
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tiny_models.internvl import make_internvl3
from tiny_models.llava import LLAVA_NEXT, LLAVA_ONEVISION, make_llava
from tiny_models.llava_next_hf import make_llava_next_hf
from tiny_models.qwen_vl import QWEN2_5_VL, QWEN2_VL, QWEN3_VL, make_qwen_vl
from transformers import LlamaConfig, MistralConfig, Qwen2Config
from transformers.utils import logging as transformers_logging

DEFAULT_NAMES = {
    "qwen2_vl": "tiny-qwen2-vl",
    "qwen2_5_vl": "tiny-qwen2.5-vl",
    "qwen3_vl": "tiny-qwen3-vl",
    "internvl3": "tiny-internvl3",
    "llava_next": "tiny-llava-next",
    "llava_onevision": "tiny-llava-onevision",
    "llava_next_hf": "tiny-llava-next-hf",
    "llava_next_hf_mistral": "tiny-llava-next-hf-mistral",
    "llava_next_hf_qwen2": "tiny-llava-next-hf-qwen2",
}
MAKERS = {
    "qwen2_vl": partial(make_qwen_vl, generation=QWEN2_VL),
    "qwen2_5_vl": partial(make_qwen_vl, generation=QWEN2_5_VL),
    "qwen3_vl": partial(make_qwen_vl, generation=QWEN3_VL),
    "internvl3": make_internvl3,
    "llava_next": partial(make_llava, kind=LLAVA_NEXT),
    "llava_onevision": partial(make_llava, kind=LLAVA_ONEVISION),
    "llava_next_hf": partial(make_llava_next_hf, text_config_class=LlamaConfig),
    "llava_next_hf_mistral": partial(make_llava_next_hf, text_config_class=MistralConfig),
    "llava_next_hf_qwen2": partial(make_llava_next_hf, text_config_class=Qwen2Config),
}


def make_model(out: Path, backbone: str, layers: int = 2, seed: int = 0) -> Path:
    """Write the model directory `out` (made if missing, files overwritten) and return its absolute
    path."""
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="directory to write, e.g. models/tiny-qwen2.5-vl")
    parser.add_argument("--backbone", choices=sorted(MAKERS), required=True)
    parser.add_argument("--layers", type=int, default=2, help="decoder layers (default 2)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the random weights (default 0)"
    )
    arguments = parser.parse_args()
    out = make_model(arguments.out, arguments.backbone, arguments.layers, arguments.seed)
    print(
        f"wrote {out} ({sum(f.stat().st_size for f in out.rglob('*') if f.is_file()) / 1e6:.1f} MB)"
    )


if __name__ == "__main__":
    main()
