"""Attention backend ``rotatek``: compress on prefill, attend over both kinds of rows. Here in plain
torch, for CPU servers; gpu.py has it in kernels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.runtime_context import get_parallel

from ..basis import get_basis
from ..config import RotateKError
from ..kernels import reference
from ..kernels.coded import FP8
from ..kernels.pools import LayerPools
from ..kernels.upload import upload
from ..memory.allocator import RotateKAllocator
from ..memory.pool import RotateKKVPool
from ..memory.prefill import PrefillLayout, Segment
from ..pruning.pruner import install_pruner

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class SegmentOnDevice(NamedTuple):
    """A segment of a prefill with its slots [n] int64 on the device."""

    rows: slice
    window: slice
    slots: torch.Tensor
    basis: int


class ForwardMetadata(NamedTuple):
    """Of one forward. ``kv_indices`` are slots: of the prefix (extend) or of the whole row
    (decode)."""

    extend_indptr: list[int]
    kv_indptr: list[int]
    kv_indices: torch.Tensor
    text_rows: torch.Tensor
    text_slots: torch.Tensor
    segments: list[SegmentOnDevice]
    errors: torch.Tensor  # [segments, 2]: sums over the layers so far of energy and error
    prefill: PrefillLayout | None


class RotateKBackend(AttentionBackend):
    """What the backends have in common: the pools, and what the scheduler told of the forward that
    comes next."""

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__()
        self.device = model_runner.device
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.token_to_kv_pool: RotateKKVPool = model_runner.token_to_kv_pool
        self.allocator: RotateKAllocator = model_runner.token_to_kv_pool_allocator
        self.stats = self.allocator.stats
        self.basis = self.allocator.config.basis
        self.rows = self.token_to_kv_pool.shape.rows
        self.fit = get_basis(self.basis, self.rows.has_residual)
        self.pruner = install_pruner(
            model_runner.model, model_runner.model_config, self.allocator.config, self.stats
        )
        self._prefill: PrefillLayout | None = None
        self._stale: Sequence[int] = ()

    def expect(self, prefill: PrefillLayout | None, stale: Sequence[int] = ()) -> None:
        """What the scheduler knows of the forward that follows; consumed where its metadata is
        made.

        ``prefill``: its layout, if it is one. ``stale``: requests (req_pool_idx) of a decode step
        whose slots in req_to_token were replaced since their last forward, but for the one that the
        step itself adds. A prefill needs none.
        """
        self._prefill = prefill
        self._stale = stale

    def _take_prefill(self, forward_batch: ForwardBatch) -> PrefillLayout | None:
        """The layout of this forward, if it computes image tokens that take visual slots. Binds
        those that were loaded."""
        prefill, self._prefill = self._prefill, None
        if prefill is not None and prefill.loaded:
            self.bind(prefill.loaded)
        if (
            prefill is None
            or not prefill.segments
            or forward_batch.forward_mode.is_decode_or_idle()
        ):
            return None
        if prefill.num_tokens != len(forward_batch.out_cache_loc):
            raise RuntimeError(
                f"RotateK gave rows to a batch of {prefill.num_tokens} tokens, the forward has "
                f"{len(forward_batch.out_cache_loc)}; a host feature changed the batch in between. "
                "Please report the server's flags."
            )
        self.stats.segments_compressed += len(prefill.segments)
        self.stats.tokens_compressed += sum(len(segment.slots) for segment in prefill.segments)
        return prefill

    def bind(self, segments: Sequence[tuple[np.ndarray, int]]) -> torch.Tensor:
        """Tell slots [n] int64 of segments their basis: on the forward stream, never when they are
        allocated. Returns all slots on the device, int32."""
        pool = self.token_to_kv_pool
        slots = np.concatenate([slots for slots, _ in segments])
        bases = np.repeat([basis for _, basis in segments], [len(slots) for slots, _ in segments])
        slots, bases = upload(np.stack([slots, bases]).astype(np.int32), self.device)
        pool.slot_to_basis[slots - pool.layout.first_visual_slot] = bases
        return slots

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the host's, when what was loaded of the layer is there. RotateKError where the model
        has stored K and V itself: it knows no narrow rows."""
        if not save_kv_cache:
            raise RotateKError(
                "--enable-rotatek must store Keys and Values itself, but the attention of layer "
                f"{layer.layer_id} stores them before; serve another model, or drop "
                "--enable-rotatek."
            )
        if (arrivals := self.token_to_kv_pool.layer_transfer_counter) is not None:
            arrivals.wait_until(layer.layer_id - self.token_to_kv_pool.start_layer)
        return super().forward(q, k, v, layer, forward_batch, **kwargs)

    def over_ranks(self, errors: torch.Tensor) -> torch.Tensor:
        """``errors`` [segments, 2] of this rank's heads; with a limit, on which all ranks must
        decide alike, of all."""
        if self.allocator.config.max_error is None or get_parallel().attn_tp_size == 1:
            return errors
        return tensor_model_parallel_all_reduce(errors) / get_parallel().attn_tp_size

    def count_errors(self, errors: torch.Tensor, segments: Sequence[Segment]) -> None:
        """``errors`` [segments, 2] of a prefill, means over its layers and heads."""
        limit = self.allocator.config.max_error
        for segment, (residual_energy, key_error) in zip(segments, errors.tolist(), strict=True):
            self.stats.errors.add(residual_energy, key_error)
            if limit is not None and key_error > limit:
                self.allocator.inexact.add(segment.pad_ids)

    @staticmethod
    def _scaled(pools: LayerPools, layer: RadixAttention) -> LayerPools:
        """With the scales of text rows in FP8 that the checkpoint gives, or that stock takes
        without any."""
        if pools.k_text.dtype != FP8 or layer.k_scale is None:
            return pools
        return pools._replace(k_scale=layer.k_scale_float, v_scale=layer.v_scale_float)

    @staticmethod
    def _heads(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        k = k.view(-1, layer.tp_k_head_num, layer.qk_head_dim)
        return q, k, v.view(-1, layer.tp_v_head_num, layer.v_head_dim)


class RotateKTorchBackend(RotateKBackend):
    forward_metadata: ForwardMetadata  # of the forward that runs

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        prefill = self._take_prefill(forward_batch)
        out_cache_loc = forward_batch.out_cache_loc
        if forward_batch.forward_mode.is_decode_or_idle():
            kv_lens = forward_batch.seq_lens.tolist()
            extend_lens = [1] * len(kv_lens)
        else:
            kv_lens = forward_batch.extend_prefix_lens_cpu
            extend_lens = forward_batch.extend_seq_lens_cpu
        rows = [
            self.req_to_token[i, :n]
            for i, n in zip(forward_batch.req_pool_indices.tolist(), kv_lens, strict=False)
        ]
        segments = []
        text_rows = torch.arange(len(out_cache_loc), device=self.device)
        if prefill is not None:
            text_rows = torch.from_numpy(~prefill.is_visual()).to(self.device).nonzero().squeeze(1)
            segments = [self._upload(segment) for segment in prefill.segments]
        self.forward_metadata = ForwardMetadata(
            [0, *accumulate(extend_lens)],
            [0, *accumulate(kv_lens)],
            torch.cat(rows) if rows else torch.empty(0, dtype=torch.int32, device=self.device),
            text_rows,
            out_cache_loc[text_rows],
            segments,
            torch.zeros(len(segments), 2, device=self.device),
            prefill,
        )

    def _upload(self, segment: Segment) -> SegmentOnDevice:
        """Also binds the slots to their basis: here, on the forward stream, never when they are
        allocated."""
        slots = torch.from_numpy(segment.slots).to(self.device)
        pool = self.token_to_kv_pool
        pool.slot_to_basis[slots - pool.layout.first_visual_slot] = segment.basis
        return SegmentOnDevice(
            slice(segment.start, segment.end), slice(*segment.window), slots, segment.basis
        )

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """Store this chunk (text as it is, segments compressed) and attend: own keys exact, prefix
        as stored."""
        metadata = self.forward_metadata
        q, k, v = self._heads(q, k, v, layer)
        pools = self._layer_pools(layer)
        self._store_text(pools, k, v)
        if metadata.prefill is not None:
            start = time.perf_counter()
            for segment, errors in zip(metadata.segments, metadata.errors, strict=True):
                errors += self._store_segment(pools, segment, q, k, v)
            self.stats.compress_seconds += time.perf_counter() - start
            pool = self.token_to_kv_pool
            if layer.layer_id == pool.start_layer + pool.layer_num - 1:
                errors = self.over_ranks(metadata.errors / pool.layer_num)
                self.count_errors(errors, metadata.prefill.segments)
        out = reference.extend(
            q,
            k,
            v,
            pools,
            metadata.extend_indptr,
            metadata.kv_indptr,
            metadata.kv_indices,
            layer.scaling,
            layer.logit_cap,
        )
        return out.flatten(1)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """Store the new tokens as text and attend over both kinds of rows."""
        metadata = self.forward_metadata
        q, k, v = self._heads(q, k, v, layer)
        pools = self._layer_pools(layer)
        self._store_text(pools, k, v)
        out = reference.decode(
            q, pools, metadata.kv_indptr, metadata.kv_indices, layer.scaling, layer.logit_cap
        )
        return out.flatten(1)

    def _layer_pools(self, layer: RadixAttention) -> LayerPools:
        return self._scaled(self.token_to_kv_pool.layer(layer.layer_id), layer)

    def _store_text(self, pools: LayerPools, k: torch.Tensor, v: torch.Tensor) -> None:
        rows = self.forward_metadata.text_rows
        reference.store_text(pools, self.forward_metadata.text_slots, k[rows], v[rows])

    def _store_segment(
        self,
        pools: LayerPools,
        segment: SegmentOnDevice,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the residual's energy and the error of the stored Keys, means over heads [2]."""
        basis = self.fit(k[segment.rows], q[segment.window], self.rows.rank)
        rows = segment.slots - self.token_to_kv_pool.layout.first_visual_slot
        reference.store_keys(pools, rows, segment.basis, basis, k[segment.rows])
        reference.store_values(pools, rows, v[segment.rows])
        return reference.key_errors(k[segment.rows], basis, segment.slots, pools).mean(0)
