"""The KV pool: slabs of text rows, of visual rows or of a basis (layout.py)."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from ..kernels.pools import CompressedPools, LayerPools, VisualRows, split_rows
from .layout import MEAN_BYTES, KVShape, PoolLayout


class RotateKKVPool(MHATokenToKVPool):
    """Of each layer l: ``k_buffer[l]`` [first_visual_slot, H, D] and ``v_buffer[l]``
    [first_visual_slot, H, Dv], the slabs seen as text; ``visual``, for all layers
    [L, all_visual_rows, ...] the same memory seen as visual rows; ``query_map[l]``
    [1 + num_slabs, H, D, r] in ``row_dtype`` and ``mean[l]`` [1 + num_slabs, H, D] fp32, seen as
    bases; and ``slot_to_basis`` [all_visual_rows] int32.

    ``row_dtype``, the model's or one as wide: of query maps, and of visual rows where they have
    16 bits.

    Everything is written inside the forward, on its stream: a freed slot or basis can have a new
    owner on the CPU while an earlier forward still reads it, and the stream keeps the two in order.
    Transfers of a host tier have a stream of their own, which host.py keeps in order with it.
    """

    def __init__(
        self, layout: PoolLayout, shape: KVShape, row_dtype: torch.dtype, **host_kwargs: Any
    ) -> None:
        self.layout = layout
        self.shape = shape
        self.row_dtype = row_dtype
        super().__init__(layout.total_slots, **host_kwargs)
        self.slot_to_basis = torch.zeros(
            layout.all_visual_rows, dtype=torch.int32, device=self.device
        )

    def _create_buffers(self) -> None:
        shape, heads = self.shape, self.head_num
        self.k_scale_buffer = self.v_scale_buffer = self.dq_k_buffer = self.dq_v_buffer = None
        self.native_k_scale_buffer = self.native_v_scale_buffer = None
        # One tensor for all layers: a GPU compresses several at a time.
        size = self.layout.first_visual_slot * heads * (self.head_dim + self.v_head_dim)
        self.memory = torch.zeros(
            (self.layer_num, size), dtype=self.store_dtype, device=self.device
        )
        k_text, v_text = split_rows(self.memory, heads, self.head_dim, self.v_head_dim)
        self.k_buffer, self.v_buffer = list(k_text), list(v_text)
        self.visual = VisualRows.view(
            self.memory, shape.rows, heads, self.head_dim, self.v_head_dim, self.row_dtype
        )
        slabs = self.memory.view(torch.uint8).unflatten(1, (1 + self.layout.num_slabs, -1))
        channels, rank = heads * self.head_dim, shape.rows.rank
        query_maps, means, _ = slabs.split(
            (
                map_bytes := channels * rank * shape.dtype_bytes,
                mean_bytes := channels * MEAN_BYTES,
                slabs.shape[-1] - map_bytes - mean_bytes,
            ),
            dim=-1,
        )
        self.query_map = query_maps.view(self.row_dtype).unflatten(-1, (heads, self.head_dim, rank))
        self.mean = means.view(torch.float32).unflatten(-1, (heads, self.head_dim))
        self._init_data_ptrs_and_strides()

    @property
    def slabs(self) -> torch.Tensor:
        """The memory as [layers, 1 + num_slabs, words], words as wide as a slab divides into, at
        most 8 bytes."""
        slabs = self.memory.view(torch.uint8).unflatten(1, (1 + self.layout.num_slabs, -1))
        wide = (torch.int64, torch.int32, torch.int16, torch.uint8)
        return slabs.view(next(dtype for dtype in wide if slabs.shape[-1] % dtype.itemsize == 0))

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """As if all were text."""
        values = self.memory.nbytes * self.v_head_dim // (self.head_dim + self.v_head_dim)
        return self.memory.nbytes - values, values

    def layer(self, layer_id: int) -> LayerPools:
        """The pools of one layer, as the kernels take them."""
        i = layer_id - self.start_layer
        z, values, residual, steps = self.visual.of(i)
        return LayerPools(
            self.k_buffer[i].view(self.dtype),
            self.v_buffer[i].view(self.dtype),
            z,
            values,
            self.query_map[i],
            self.mean[i],
            self.slot_to_basis,
            residual,
            steps,
        )

    def compressed(self, layers: slice) -> CompressedPools:
        """What compression writes in ``layers``, counted from this rank's first."""
        z, _, residual, steps = self.visual.of(layers)
        first_visual_slot = self.layout.first_visual_slot
        return CompressedPools(
            z, self.query_map[layers], self.mean[layers], first_visual_slot, residual, steps
        )

    def set_kv_buffer(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("set_kv_buffer")

    def get_contiguous_buf_infos(self) -> NoReturn:
        _refuse("get_contiguous_buf_infos")

    def get_cpu_copy(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("get_cpu_copy")

    def load_cpu_copy(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("load_cpu_copy")

    def move_kv_cache(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("move_kv_cache")


def _refuse(method: str) -> NoReturn:
    raise RuntimeError(
        f"RotateKKVPool.{method} was called, but visual Keys have no full-width row to give; the "
        "host feature that calls it must be refused at start. Please report the server's flags."
    )
