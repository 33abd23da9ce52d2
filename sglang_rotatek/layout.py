"""Which slot id lies in which pool, and how bytes turn into slots.

Slot ids are plain integers that the host keeps in its tables unchanged:

    0                                 padding row (host convention)
    1 ... text_slots                  text pool:   K [H, D]   V [H, Dv]
    text_slots + 1 ... total_slots    visual pool: z [H, r]   V [H, Dv]
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import RotateKConfig

MEAN_BYTES = 4  # means are fp32: a rounded q.mean shifts all visual scores against the text at once
MIN_BASES = 4


@dataclass(frozen=True)
class KVShape:
    """Shape of one rank's KV cache. ``kv_bytes`` is the size of one stored element."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    rank: int
    kv_bytes: int

    @property
    def _heads(self) -> int:
        return self.num_layers * self.num_kv_heads

    @property
    def text_row_bytes(self) -> int:
        return self._heads * (self.head_dim + self.v_head_dim) * self.kv_bytes

    @property
    def visual_row_bytes(self) -> int:
        return self._heads * (self.rank + self.v_head_dim) * self.kv_bytes

    @property
    def basis_bytes(self) -> int:
        """Query map [D, r] in the KV dtype and mean [D] in fp32, for every layer and head."""
        return self._heads * self.head_dim * (self.rank * self.kv_bytes + MEAN_BYTES)


@dataclass(frozen=True)
class PoolLayout:
    """Sizes of the three pools, in slots (= tokens) and bases."""

    text_slots: int
    visual_slots: int
    num_bases: int

    @property
    def total_slots(self) -> int:
        return self.text_slots + self.visual_slots

    @property
    def first_visual_slot(self) -> int:
        return self.text_slots + 1

    def bytes(self, shape: KVShape) -> int:
        """Bytes of the pools, the padding row left out as the host does."""
        return (
            self.text_slots * shape.text_row_bytes
            + self.visual_slots * shape.visual_row_bytes
            + self.num_bases * shape.basis_bytes
        )


def layout_of_total(total_slots: int, config: RotateKConfig, shape: KVShape) -> PoolLayout:
    """Split ``total_slots`` so that visual rows and bases take ``config.visual_fraction`` of the bytes."""
    visual_token_bytes = shape.visual_row_bytes + shape.basis_bytes / config.expected_segment_tokens
    visual = config.visual_fraction / visual_token_bytes
    text = (1 - config.visual_fraction) / shape.text_row_bytes
    visual_slots = int(total_slots * visual / (visual + text))
    num_bases = max(MIN_BASES, -(-visual_slots // config.expected_segment_tokens))
    return PoolLayout(total_slots - visual_slots, visual_slots, num_bases)


def layout_of_bytes(budget_bytes: int, config: RotateKConfig, shape: KVShape) -> PoolLayout:
    """The largest layout of ``layout_of_total`` that fits ``budget_bytes``; may have 0 slots when none does.

    The host carries only the total through its configuration, so the total alone must determine the split.
    """
    low, high = 0, budget_bytes // shape.visual_row_bytes
    while low < high:
        middle = (low + high + 1) // 2
        if layout_of_total(middle, config, shape).bytes(shape) <= budget_bytes:
            low = middle
        else:
            high = middle - 1
    return layout_of_total(low, config, shape)
