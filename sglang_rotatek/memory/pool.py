"""The KV pool: slabs of text rows, of rotated rows or of a basis (layout.py)."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from ..basis import Basis
from ..kernels import reference
from ..kernels.reference import CompressedPools, split_rows
from .layout import MEAN_BYTES, KVShape, PoolLayout


class RotateKKVPool(MHATokenToKVPool):
    """Of each layer l: ``k_buffer[l]`` [first_visual_slot, H, D] and ``v_buffer[l]`` [first_visual_slot, H, Dv], the
    slabs seen as text; ``z_buffer[l]`` [all_visual_rows, H, r] and ``v_visual[l]`` [all_visual_rows, H, Dv], the same
    memory seen as rotated rows; ``query_map[l]`` [1 + num_slabs, H, D, r] and ``mean[l]`` [1 + num_slabs, H, D] fp32,
    seen as bases; and ``slot_to_basis`` [all_visual_rows] int32.

    Everything is written inside the forward, on its stream: a freed slot or basis can have a new owner on the
    CPU while an earlier forward still reads it, and the stream keeps the two in order.
    """

    def __init__(self, layout: PoolLayout, shape: KVShape, **host_kwargs) -> None:
        self.layout = layout
        self.shape = shape
        super().__init__(layout.total_slots, **host_kwargs)
        self.slot_to_basis = torch.zeros(layout.all_visual_rows, dtype=torch.int32, device=self.device)

    def _create_buffers(self) -> None:
        rank, heads = self.shape.rank, self.head_num
        self.k_scale_buffer = self.v_scale_buffer = self.dq_k_buffer = self.dq_v_buffer = None
        self.native_k_scale_buffer = self.native_v_scale_buffer = None
        # One tensor for all layers: a GPU compresses several at a time.
        size = self.layout.first_visual_slot * heads * (self.head_dim + self.v_head_dim)
        self.memory = torch.zeros((self.layer_num, size), dtype=self.store_dtype, device=self.device)
        k_text, v_text = split_rows(self.memory, heads, self.head_dim, self.v_head_dim)
        self.k_buffer, self.v_buffer = list(k_text), list(v_text)
        self.z_buffer, self.v_visual = split_rows(self.memory, heads, rank, self.v_head_dim)
        slabs = self.memory.unflatten(1, (1 + self.layout.num_slabs, -1))
        map_size, mean_size = heads * self.head_dim * rank, heads * self.head_dim * MEAN_BYTES // self.store_dtype.itemsize
        self.query_map = slabs[..., :map_size].unflatten(-1, (heads, self.head_dim, rank))
        self.mean = slabs[..., map_size : map_size + mean_size].view(torch.float32).unflatten(-1, (heads, self.head_dim))
        self._init_data_ptrs_and_strides()

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """As if all were text."""
        values = self.memory.nbytes * self.v_head_dim // (self.head_dim + self.v_head_dim)
        return self.memory.nbytes - values, values

    def layer(self, layer_id: int) -> reference.LayerPools:
        """The pools of one layer, as the kernels take them."""
        i = layer_id - self.start_layer
        return reference.LayerPools(
            self.k_buffer[i],
            self.v_buffer[i],
            self.z_buffer[i],
            self.v_visual[i],
            self.query_map[i],
            self.mean[i],
            self.slot_to_basis,
        )

    def compressed(self, layers: slice) -> CompressedPools:
        """What compression writes in ``layers``, counted from this rank's first."""
        return CompressedPools(
            self.z_buffer[layers], self.query_map[layers], self.mean[layers], self.layout.first_visual_slot
        )

    def store_text(self, layer_id: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write k [n, H, D] and v [n, H, Dv] to text ``slots`` [n]."""
        i = layer_id - self.start_layer
        self.k_buffer[i][slots] = k.to(self.dtype)
        self.v_buffer[i][slots] = v.to(self.dtype)

    def store_visual(
        self, layer_id: int, slots: torch.Tensor, basis_id: int, basis: Basis, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Write one segment: its basis, rotated keys of k [n, H, D], and v [n, H, Dv] to visual ``slots`` [n]."""
        self.store_keys(layer_id, slots, basis_id, basis, k)
        self.v_visual[layer_id - self.start_layer][slots - self.layout.first_visual_slot] = v.to(self.dtype)

    def store_keys(self, layer_id: int, slots: torch.Tensor, basis_id: int, basis: Basis, k: torch.Tensor) -> None:
        """``store_visual`` without the values."""
        i = layer_id - self.start_layer
        self.query_map[i][basis_id] = basis.query_map.to(self.dtype)
        self.mean[i][basis_id] = basis.mean
        rotated = reference.compress(k, basis.key_map, basis.mean)
        self.z_buffer[i][slots - self.layout.first_visual_slot] = rotated.to(self.dtype)

    def set_kv_buffer(self, *args, **kwargs):
        _refuse("set_kv_buffer")

    def get_contiguous_buf_infos(self):
        _refuse("get_contiguous_buf_infos")

    def get_cpu_copy(self, *args, **kwargs):
        _refuse("get_cpu_copy")

    def load_cpu_copy(self, *args, **kwargs):
        _refuse("load_cpu_copy")

    def move_kv_cache(self, *args, **kwargs):
        _refuse("move_kv_cache")


def _refuse(method: str):
    raise RuntimeError(
        f"RotateKKVPool.{method} was called, but visual Keys have no full-width row to give; the host feature that "
        "calls it must be refused at start. Please report the server's flags."
    )
