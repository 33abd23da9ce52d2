"""Print the table of capacity in scripts/results/README.md: bytes of a token, and tokens and chats
in the same bytes, by format of the rows.

    python scripts/bench/capacity.py [--gib 16] [--visual-fraction 0.95] [--image-tokens 2928]
    [--text-tokens 161]

Arithmetic of sglang_rotatek.memory.layout for the shapes of two models in bf16 on one GPU; nothing
is measured. A chat is one image, in one segment, and its text. The slabs of bases are counted in
the chats, not in the image tokens at most. The last columns compare chats, before they are rounded
down to whole ones, with stock's in bf16 and with --kv-cache-dtype fp8_e4m3.
"""

from __future__ import annotations

import argparse

from tabulate import tabulate

from sglang_rotatek.config import RotateKConfig
from sglang_rotatek.kernels.row_format import RowFormat
from sglang_rotatek.memory.layout import KVShape, PoolLayout, layout_of_bytes

HEAD_DIM = 128
BF16_BYTES, FP8_BYTES = 2, 1
# Name -> (num_layers, num_kv_heads).
MODELS = {"Qwen2.5-VL-7B": (28, 4), "LLaVA-NeXT-8B": (32, 8)}
# Name -> format of image tokens (None: stock) and bytes of an element of text.
FORMATS = {
    "stock": (None, BF16_BYTES),
    "stock, FP8": (None, FP8_BYTES),
    "key bits 16, ratio 0.5": (RowFormat(64, 16, 16), BF16_BYTES),
    "key bits 16, ratio 0.25": (RowFormat(32, 16, 16), BF16_BYTES),
    "key bits 4": (RowFormat(16, 4, 4), BF16_BYTES),
    "key bits 4, text FP8": (RowFormat(16, 4, 4), FP8_BYTES),
    "key bits 2": (RowFormat(16, 2, 4), BF16_BYTES),
    "key bits 2, text FP8": (RowFormat(16, 2, 4), FP8_BYTES),
}


def chats_held(layout: PoolLayout, image_tokens: int, text_tokens: int) -> float:
    """How many chats of one image segment and its text fit; the fraction is that of one more."""
    image_slabs = layout.slabs_of(image_tokens)
    return min(
        layout.num_slabs / (image_slabs + text_tokens / layout.text_rows),
        layout.max_visual_slabs / image_slabs,
    )


def table(
    budget_bytes: int, visual_fraction: float, image_tokens: int, text_tokens: int
) -> list[list[str]]:
    """Header and rows."""
    header = [
        "model",
        "image tokens",
        "KV bytes of an image token",
        "tokens, all text",
        "image tokens at most",
    ]
    header += [
        f"chats of {image_tokens:,} image + {text_tokens:,} text",
        "against stock",
        "against stock FP8",
    ]
    rows = [header]
    config = RotateKConfig(visual_fraction=visual_fraction)
    for model, (num_layers, num_kv_heads) in MODELS.items():
        for name, (form, text_bytes) in FORMATS.items():
            stored = form or RowFormat(HEAD_DIM, 16, 16)
            shape = KVShape(
                num_layers, num_kv_heads, HEAD_DIM, HEAD_DIM, stored, text_bytes, BF16_BYTES
            )
            stock_chats = budget_bytes // shape.full_row_bytes / (image_tokens + text_tokens)
            if form is None:
                row_bytes = shape.text_row_bytes
                text = images = budget_bytes // row_bytes
                chats = text / (image_tokens + text_tokens)
            else:
                layout = layout_of_bytes(budget_bytes, config, shape)
                row_bytes, text, images = (
                    shape.visual_row_bytes,
                    layout.text_slots,
                    layout.visual_slots,
                )
                chats = chats_held(layout, image_tokens, text_tokens)
            numbers = [f"{row_bytes / 1024:g} KiB", f"{text:,}", f"{images:,}", f"{int(chats):,}"]
            against = (f"{chats / stock:.2f} times" for stock in (stock_chats, 2 * stock_chats))
            rows.append([model, name, *numbers, *against])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gib", type=float, default=16, help="KV bytes in GiB (default %(default)s)"
    )
    default = RotateKConfig().visual_fraction
    parser.add_argument(
        "--visual-fraction",
        type=float,
        default=default,
        help="as the server's (default %(default)s)",
    )
    parser.add_argument(
        "--image-tokens", type=int, default=2928, help="of a chat (default %(default)s)"
    )
    parser.add_argument(
        "--text-tokens", type=int, default=161, help="of a chat (default %(default)s)"
    )
    arguments = parser.parse_args()
    budget_bytes = int(arguments.gib * 2**30)
    header, *rows = table(
        budget_bytes, arguments.visual_fraction, arguments.image_tokens, arguments.text_tokens
    )
    print(tabulate(rows, header, "github", disable_numparse=True))


if __name__ == "__main__":
    main()
