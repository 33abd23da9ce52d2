"""How many tokens of an image fit a share of the bytes that it takes in stock's cache, by format of
their rows.

A format is an arm of fidelity_arms.py that a server can store: ``full`` (rows of text), ``rankR``,
the paper's, or ``A+zB/zV``, coded. Narrow ones take whole slabs, that of the basis among them, as
memory/layout.py lays them out.
"""

from __future__ import annotations

import re

from fidelity_models import Model

from sglang_rotatek.config import RotateKConfig
from sglang_rotatek.kernels.row_format import RowFormat
from sglang_rotatek.memory.layout import KVShape, layout_of_slabs

FULL = "full"
BF16_BYTES = 2


def row_format(name: str) -> RowFormat:
    """Of a narrow format. ValueError for one that no server stores."""
    if match := re.fullmatch(r"rank(\d+)", name):
        return RowFormat(int(match[1]), 16, 16)
    if match := re.fullmatch(r"(\d+)\+z([42])/z([42])", name):
        return RowFormat(*map(int, match.groups()))
    raise ValueError(
        f"a format of rows must be {FULL}, rankR or A+zB/zV with B and V of 4, 2, got {name!r}"
    )


class Budget:
    """Bytes of one image of a model, as shares of its bytes in stock's cache in bf16."""

    def __init__(self, model: Model) -> None:
        self._sizes = model.num_layers, model.num_kv_heads, model.head_dim, model.head_dim

    def _shape(self, name: str) -> KVShape:
        return KVShape(*self._sizes, row_format(name), BF16_BYTES, BF16_BYTES)

    def share(self, name: str, kept: int, num_tokens: int) -> float:
        """Of ``kept`` of ``num_tokens``, in ``name``."""
        if name == FULL:
            return kept / num_tokens
        shape = self._shape(name)
        slabs = layout_of_slabs(1, RotateKConfig(), shape).slabs_of(kept)
        return slabs * shape.slab_bytes / (num_tokens * shape.full_row_bytes)

    def ideal_share(self, name: str, kept: int, num_tokens: int) -> float:
        """The same without bases and the rest of slabs."""
        if name == FULL:
            return kept / num_tokens
        shape = self._shape(name)
        return kept * shape.visual_row_bytes / (num_tokens * shape.full_row_bytes)

    def most_tokens(self, name: str, share: float, num_tokens: int) -> int:
        """The most tokens, up to all, within ``share``; 0 where not one fits."""
        if name == FULL:
            return int(share * num_tokens + 1e-9)
        shape = self._shape(name)
        slabs = int(share * num_tokens * shape.full_row_bytes / shape.slab_bytes + 1e-9)
        return max(0, min(num_tokens, (slabs - 1) * shape.visual_rows))
