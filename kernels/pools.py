"""The KV memory of layers as kernels take it: views of slabs, by kind of row."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .coded import FP8
from .row_format import STEP_BYTES, RowFormat


class VisualRows(NamedTuple):
    """Visual rows of one layer, or with a dimension before of several. ``row_format.py`` has the
    formats.

    z [rows, H, r] in the model's dtype, or int8; values [rows, H, Dv] in the model's dtype or FP8,
    or uint8 [rows, H, Dv * bits / 8]; residual uint8 [rows, H, D * bits / 8] or None; steps uint8
    [rows, H, 4 or 8] or None: those of the residual, if there is one, then of the Value codes, if
    there are (coded.Codes).
    """

    z: torch.Tensor
    values: torch.Tensor
    residual: torch.Tensor | None = None
    steps: torch.Tensor | None = None

    @classmethod
    def view(
        cls,
        memory: torch.Tensor,
        form: RowFormat,
        num_heads: int,
        head_dim: int,
        v_head_dim: int,
        dtype: torch.dtype,
    ) -> VisualRows:
        """Views of ``memory`` [layers, n], seen as rows in which each part holds all heads.
        ``dtype``: the model's."""
        row_bytes = num_heads * form.row_bytes(head_dim, v_head_dim, dtype.itemsize)
        rows = memory.view(torch.uint8).unflatten(1, (-1, row_bytes))
        start = 0

        def part(head_bytes: int, of: torch.dtype) -> torch.Tensor:
            nonlocal start
            end = start + num_heads * head_bytes
            tensor = rows[..., start:end].view(of).unflatten(-1, (num_heads, -1))
            start = end
            return tensor

        def codes(head_bytes: int) -> torch.Tensor | None:
            return part(head_bytes, torch.uint8) if head_bytes else None

        value_dtype = {16: dtype, 8: FP8}.get(form.value_bits, torch.uint8)
        z = part(form.z_bytes(dtype.itemsize), torch.int8 if form.has_residual else dtype)
        residual = codes(form.residual_bytes(head_dim))
        values = part(form.code_bytes(v_head_dim, dtype.itemsize), value_dtype)
        return cls(z, values, residual, codes(form.steps_bytes))

    def of(self, layers: int | slice) -> VisualRows:
        """Of one or some of several layers."""
        residual, steps = (None if x is None else x[layers] for x in (self.residual, self.steps))
        return VisualRows(self.z[layers], self.values[layers], residual, steps)

    @property
    def residual_steps(self) -> torch.Tensor:
        assert self.steps is not None
        return self.steps[..., :STEP_BYTES]

    @property
    def value_steps(self) -> torch.Tensor:
        assert self.steps is not None
        return self.steps[..., -STEP_BYTES:]


class _LayerPools(NamedTuple):
    k_text: torch.Tensor
    v_text: torch.Tensor
    z: torch.Tensor
    v_visual: torch.Tensor
    query_map: torch.Tensor
    mean: torch.Tensor
    slot_to_basis: torch.Tensor
    residual: torch.Tensor | None = None
    steps: torch.Tensor | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0


class LayerPools(_LayerPools):
    """One layer's view of the pools. Slot s is visual when s >= len(k_text) (= first_visual_slot),
    and then lies in row s - len(k_text) of the visual rows. Rows and bases may be strided; all but
    their first dimension is contiguous. The pools and the bases may be views of one memory, each
    part of which is one of them at a time.

    k_text [first_visual_slot, H, D] · v_text [first_visual_slot, H, Dv] · query_map
    [bases, H, D, r] · mean [bases, H, D] fp32 · slot_to_basis [visual_rows] int32 · z, v_visual,
    residual, steps: VisualRows.
    Text rows in FP8 hold k / k_scale and v / v_scale.

    What follows from the tensors is found once: every launch of every layer asks for it.
    """

    @functools.cached_property
    def visual(self) -> VisualRows:
        return VisualRows(self.z, self.v_visual, self.residual, self.steps)

    @functools.cached_property
    def strides(self) -> tuple[int, ...]:
        """Of the first dimension of each tensor, in the order of the fields; 0 of None."""
        return tuple(0 if x is None else x.stride(0) for x in self[:9])

    @functools.cached_property
    def is_coded(self) -> bool:
        """Whether visual rows hold anything but numbers of the model's dtype."""
        return self.key_bits < 16 or self.value_bits < 16

    @functools.cached_property
    def key_bits(self) -> int:
        return 16 if self.residual is None else 8 * self.residual.shape[-1] // self.k_text.shape[-1]

    @functools.cached_property
    def value_bits(self) -> int:
        if self.v_visual.dtype == torch.uint8:
            return 8 * self.v_visual.shape[-1] // self.v_text.shape[-1]
        return 8 if self.v_visual.dtype == FP8 else 16


class CompressedPools(NamedTuple):
    """What compression writes, for L layers: query_map [L, bases, H, D, r], mean [L, bases, H, D]
    fp32, and of the VisualRows, all with a first dimension L, z, residual and steps; row 0 of z is
    slot ``first_visual_slot``."""

    z: torch.Tensor
    query_map: torch.Tensor
    mean: torch.Tensor
    first_visual_slot: int
    residual: torch.Tensor | None = None
    steps: torch.Tensor | None = None


def split_rows(
    memory: torch.Tensor, num_heads: int, key_channels: int, value_channels: int
) -> tuple[torch.Tensor, ...]:
    """``memory`` [layers, n] as rows of a Key and a Value: views
    [layers, rows, H, key or value channels]."""
    keys, values = num_heads * key_channels, num_heads * value_channels
    rows = memory.view(len(memory), -1, keys + values)
    return rows[..., :keys].unflatten(-1, (num_heads, -1)), rows[..., keys:].unflatten(
        -1, (num_heads, -1)
    )
