"""Print the README's capacity table: bytes per token, and tokens and chats in the same bytes, by rank.

    python scripts/capacity.py [--gib 16] [--visual-fraction 0.95] [--image-tokens 2928] [--text-tokens 161]

Arithmetic of sglang_rotatek.memory.layout for the shapes of two models in bf16 on one GPU; nothing is measured. A chat is one
image, in one segment, and its text. The slabs of bases are counted in the chats, not in the image tokens at most. The
last column compares chats before they are rounded down to whole ones.
"""

from __future__ import annotations

import argparse

from sglang_rotatek.config import RotateKConfig
from sglang_rotatek.memory.layout import KVShape, PoolLayout, layout_of_bytes

HEAD_DIM = 128
BF16_BYTES = 2
# Name -> (num_layers, num_kv_heads).
MODELS = {"Qwen2.5-VL-7B": (28, 4), "LLaVA-NeXT-8B": (32, 8)}
RANKS = (64, 32, 16)


def chats_held(layout: PoolLayout, image_tokens: int, text_tokens: int) -> float:
    """How many chats of one image segment and its text fit; the fraction is that of one more."""
    image_slabs = layout.slabs_of(image_tokens)
    return min(
        layout.num_slabs / (image_slabs + text_tokens / layout.text_rows),
        layout.max_visual_slabs / image_slabs,
    )


def table(budget_bytes: int, visual_fraction: float, image_tokens: int, text_tokens: int) -> list[list[str]]:
    """Header and rows as Markdown cells."""
    chat = f"chats of {image_tokens:,} image + {text_tokens:,} text tokens"
    header = ["model", "Keys of an image token", "KV bytes of an image token", "tokens, all text"]
    header += ["image tokens at most", f"chats of {image_tokens:,} image + {text_tokens:,} text", "against stock"]
    rows = [header]
    for model, (num_layers, num_kv_heads) in MODELS.items():
        for rank in (HEAD_DIM, *RANKS):
            config = RotateKConfig(keep_ratio=rank / HEAD_DIM, visual_fraction=visual_fraction)
            shape = KVShape(num_layers, num_kv_heads, HEAD_DIM, HEAD_DIM, rank, BF16_BYTES)
            stock_tokens = budget_bytes // shape.text_row_bytes
            stock_chats = stock_tokens / (image_tokens + text_tokens)
            if rank == HEAD_DIM:
                keys, text, images, chats = "full (stock)", stock_tokens, stock_tokens, stock_chats
            else:
                layout = layout_of_bytes(budget_bytes, config, shape)
                keys, text, images = f"rank {rank}", layout.text_slots, layout.visual_slots
                chats = chats_held(layout, image_tokens, text_tokens)
            numbers = [f"{shape.visual_row_bytes / 1024:g} KiB", f"{text:,}", f"{images:,}", f"{int(chats):,}"]
            rows.append([model, keys, *numbers, f"{chats / stock_chats:.2f} times"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=16, help="KV bytes in GiB (default %(default)s)")
    default = RotateKConfig().visual_fraction
    parser.add_argument("--visual-fraction", type=float, default=default, help="as the server's (default %(default)s)")
    parser.add_argument("--image-tokens", type=int, default=2928, help="of a chat (default %(default)s)")
    parser.add_argument("--text-tokens", type=int, default=161, help="of a chat (default %(default)s)")
    arguments = parser.parse_args()
    budget_bytes = int(arguments.gib * 2**30)
    header, *rows = table(budget_bytes, arguments.visual_fraction, arguments.image_tokens, arguments.text_tokens)
    for cells in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
