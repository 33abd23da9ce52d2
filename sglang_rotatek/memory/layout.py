"""Which slot id lies where, and how bytes turn into slots.

The KV memory of a layer is one array of equal *slabs*. A slab is free, or holds text rows, or
visual rows of one image segment, or the basis of one; so text and images share the memory in any
proportion, and it moves between them slab by slab (D = Dv = 128, bf16; the paper's rows at r = 32 |
coded rows of 152 bytes a head):

    text slab       20 | 19 x (K [H, D] V [H, Dv])
    visual slab     32 | 64 x what row_format.py says
    basis slab      query map [H, D, r], mean [H, D] fp32, and some 15 % | 53 % unused

Slot ids are plain integers that the host keeps in its tables unchanged; the id says which kind of
row it is. With A text or B visual rows in a slab, slab s has the ids

    text            s * A ... s * A + A - 1
    visual          first_visual_slot + s * B ... first_visual_slot + s * B + B - 1
    basis           s

and never more than one kind at a time. Slab 0 is never given out: slot 0 is the host's padding row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import RotateKConfig
from ..kernels.row_format import RowFormat

MEAN_BYTES = 4  # means are fp32: a rounded q.mean shifts all visual scores against the text at once


@dataclass(frozen=True)
class KVShape:
    """Shape of one rank's KV cache. ``rows``: the format of visual rows; ``kv_bytes``: of an
    element of text rows; ``dtype_bytes``: of the pool's row_dtype, which query maps and whatever of
    visual rows has 16 bits are in."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    rows: RowFormat
    kv_bytes: int
    dtype_bytes: int

    @property
    def _heads(self) -> int:
        return self.num_layers * self.num_kv_heads

    @property
    def full_row_bytes(self) -> int:
        """Of a token in stock's cache without quantisation."""
        return self._heads * (self.head_dim + self.v_head_dim) * self.dtype_bytes

    @property
    def text_row_bytes(self) -> int:
        return self._heads * (self.head_dim + self.v_head_dim) * self.kv_bytes

    @property
    def visual_row_bytes(self) -> int:
        return self._heads * self.rows.row_bytes(self.head_dim, self.v_head_dim, self.dtype_bytes)

    @property
    def basis_bytes(self) -> int:
        """Query map [D, r] in the model's dtype and mean [D] in fp32, for every layer and head."""
        return self._heads * self.head_dim * (self.rows.rank * self.dtype_bytes + MEAN_BYTES)

    @property
    def text_rows(self) -> int:
        """Text rows of a slab: the fewest that hold a basis and whose bytes are also whole visual
        rows."""
        fewest = self.visual_row_bytes // math.gcd(self.text_row_bytes, self.visual_row_bytes)
        return fewest * -(-self.basis_bytes // (fewest * self.text_row_bytes))

    @property
    def visual_rows(self) -> int:
        """Visual rows of a slab."""
        return self.text_rows * self.text_row_bytes // self.visual_row_bytes

    @property
    def slab_bytes(self) -> int:
        return self.text_rows * self.text_row_bytes


@dataclass(frozen=True)
class PoolLayout:
    """``num_slabs`` slabs besides slab 0, of ``text_rows`` or ``visual_rows`` rows; images may hold
    ``max_visual_slabs`` of them."""

    num_slabs: int
    max_visual_slabs: int
    text_rows: int
    visual_rows: int

    @property
    def text_slots(self) -> int:
        """Tokens that fit when all are text."""
        return self.num_slabs * self.text_rows

    @property
    def visual_slots(self) -> int:
        """Image tokens that fit at most, the slabs of their bases left out."""
        return self.max_visual_slabs * self.visual_rows

    @property
    def total_slots(self) -> int:
        """Tokens that fit at most."""
        return self.visual_slots + (self.num_slabs - self.max_visual_slabs) * self.text_rows

    @property
    def first_visual_slot(self) -> int:
        return (1 + self.num_slabs) * self.text_rows

    @property
    def all_visual_rows(self) -> int:
        """Rows behind the visual slot ids, those of slabs that hold text and of slab 0 included."""
        return (1 + self.num_slabs) * self.visual_rows

    def slabs_of(self, num_tokens: int) -> int:
        """Slabs that a segment of ``num_tokens`` takes, that of its basis among them."""
        return 1 - (-num_tokens // self.visual_rows)

    def is_smaller_narrow(self, num_tokens: int) -> bool:
        """Whether a segment of ``num_tokens`` takes less memory in visual rows than in text
        rows."""
        return self.slabs_of(num_tokens) * self.text_rows < num_tokens

    def bytes(self, shape: KVShape) -> int:
        """Bytes of the slabs, slab 0 left out as the host leaves out its padding row."""
        return self.num_slabs * shape.slab_bytes


def layout_of_slabs(num_slabs: int, config: RotateKConfig, shape: KVShape) -> PoolLayout:
    return PoolLayout(
        num_slabs, int(num_slabs * config.visual_fraction), shape.text_rows, shape.visual_rows
    )


def layout_of_total(total_slots: int, config: RotateKConfig, shape: KVShape) -> PoolLayout:
    """The largest layout of at most ``total_slots`` tokens; the host's configuration carries
    nothing but the total."""
    low, high = 0, total_slots // shape.text_rows
    while low < high:
        middle = (low + high + 1) // 2
        if layout_of_slabs(middle, config, shape).total_slots <= total_slots:
            low = middle
        else:
            high = middle - 1
    return layout_of_slabs(low, config, shape)


def layout_of_bytes(budget_bytes: int, config: RotateKConfig, shape: KVShape) -> PoolLayout:
    """The largest layout that fits ``budget_bytes``; may have no slabs when none does."""
    return layout_of_slabs(budget_bytes // shape.slab_bytes, config, shape)
