"""Print the README's capacity table: bytes per token, and tokens in the same bytes, by rank.

    python scripts/capacity.py [--gib 16] [--visual-fraction 0.9]

Arithmetic of sglang_rotatek.layout for the shapes of two models in bf16 on one GPU; nothing is measured.
"""

from __future__ import annotations

import argparse

from sglang_rotatek.config import RotateKConfig
from sglang_rotatek.layout import KVShape, layout_of_bytes

HEAD_DIM = 128
BF16_BYTES = 2
# Name -> (num_layers, num_kv_heads).
MODELS = {"Qwen2.5-VL-7B": (28, 4), "LLaVA-NeXT-8B": (32, 8)}
RANKS = (64, 32, 16)


def table(budget_bytes: int, visual_fraction: float) -> list[list[str]]:
    """Header and rows as Markdown cells."""
    rows = [["model", "Keys of an image token", "KV bytes of an image token", "text + image tokens", "in all, against stock"]]
    for model, (num_layers, num_kv_heads) in MODELS.items():
        for rank in (HEAD_DIM, *RANKS):
            config = RotateKConfig(keep_ratio=rank / HEAD_DIM, visual_fraction=visual_fraction)
            shape = KVShape(num_layers, num_kv_heads, HEAD_DIM, HEAD_DIM, rank, BF16_BYTES)
            stock_tokens = budget_bytes // shape.text_row_bytes
            if rank == HEAD_DIM:
                rows.append([model, "full (stock)", f"{shape.text_row_bytes / 1024:g} KiB", f"{stock_tokens:,}", "1.00x"])
                continue
            layout = layout_of_bytes(budget_bytes, config, shape)
            rows.append(
                [
                    model,
                    f"rank {rank}",
                    f"{shape.visual_row_bytes / 1024:g} KiB",
                    f"{layout.text_slots:,} + {layout.visual_slots:,}",
                    f"{layout.total_slots / stock_tokens:.2f}x",
                ]
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=16, help="KV bytes in GiB (default %(default)s)")
    parser.add_argument("--visual-fraction", type=float, default=RotateKConfig().visual_fraction, help="(default %(default)s)")
    arguments = parser.parse_args()
    header, *rows = table(int(arguments.gib * 2**30), arguments.visual_fraction)
    for cells in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
