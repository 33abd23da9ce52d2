"""Attention backend ``rotatek`` on a GPU: the kernels, with plans that CUDA graphs replay."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds
from sglang.srt.runtime_context import get_parallel

from ..basis import paper
from ..config import RotateKError
from ..kernels import compress, decode, expand, extend, reference
from ..kernels.coded import FP8
from ..kernels.own_chunk import Ragged, own_chunk_attention
from ..kernels.partition import Partition
from ..kernels.plan import Partials, Plan
from ..kernels.pools import LayerPools
from ..kernels.row_format import RowFormat
from ..kernels.store import store
from ..kernels.upload import upload
from ..memory.prefill import PrefillLayout
from .backend import RotateKBackend
from .workspace import expanded_tokens, partial_rows

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


logger = logging.getLogger(__name__)
FP8_CAPABILITY = (8, 9)


class Images(NamedTuple):
    """The segments of one forward, and the Keys of a group of its layers.

    slots [n] int32 of the n visual tokens; rows [tokens] int64: which of them a token of the batch
    is; windows: the query rows that each segment's basis may look at; keys [group, n, H, D]; errors
    [L, S, H, 2] fp32 of coded Keys, all layers.
    """

    segments: compress.Segments
    slots: torch.Tensor
    rows: torch.Tensor
    windows: list[slice]
    keys: torch.Tensor
    weights: list[torch.Tensor]
    errors: torch.Tensor | None
    prefill: PrefillLayout


class Errors(NamedTuple):
    """Of a prefill's segments, on their way to the CPU: [S, 2], there after ``copied``."""

    of_segments: torch.Tensor
    copied: torch.cuda.Event
    prefill: PrefillLayout


class Expansion(NamedTuple):
    """Prefixes of a prefill at full width, with its new tokens behind each: see expand.expand."""

    req_pool_indices: torch.Tensor
    prefix_lens: torch.Tensor
    kv_indptr: torch.Tensor
    max_len: int
    keys: torch.Tensor
    values: torch.Tensor


class ForwardMetadata(NamedTuple):
    """Of one forward. ``plan`` is None in a prefill without any cached prefix, and where it is
    expanded; ``is_stored``: it covers the new tokens too, else the prefix alone."""

    plan: Plan | None
    q_indptr: torch.Tensor
    images: Images | None = None
    is_stored: bool = False
    expansion: Expansion | None = None


def check_fp8(rows: RowFormat, kv_dtype: torch.dtype, capability: tuple[int, int]) -> None:
    """Raise RotateKError for FP8 on a GPU whose Triton has none."""
    if capability >= FP8_CAPABILITY or (kv_dtype != FP8 and rows.value_bits != 8):
        return
    flag = "--kv-cache-dtype fp8_e4m3" if kv_dtype == FP8 else "--rotatek-value-bits 8"
    raise RotateKError(
        f"--enable-rotatek with {flag} needs a GPU of compute capability 8.9 (Ada, Hopper) or "
        f"later, found {capability[0]}.{capability[1]}; drop {flag}: 4-bit Values are smaller."
    )


class RotateKGPUBackend(RotateKBackend):
    # Plans are made on the device, from the device's lengths.
    needs_cpu_seq_lens = False
    forward_metadata: ForwardMetadata  # of the forward that runs

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__(model_runner)
        self.num_heads = (
            model_runner.model_config.num_attention_heads // get_parallel().attn_tp_size
        )
        self.num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        pool = self.token_to_kv_pool
        check_fp8(self.rows, pool.dtype, torch.cuda.get_device_capability(self.device))
        self._pools = [pool.layer(pool.start_layer + i) for i in range(pool.layer_num)]
        self._start_vectors = compress.start_vectors(pool.head_dim, self.rows.rank, self.device)
        self._own_chunk = own_chunk_attention(self.device)
        self._allocate()
        self._timers: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._errors: deque[Errors] = deque()
        self.allocator.settle_errors = self._settle_errors
        self._warm_up()

    def _allocate(self) -> None:
        """What steps take beside the KV pool (workspace.py). Forwards follow each other on one
        stream, so they share it, and captured graphs may read it for ever."""
        pool = self.token_to_kv_pool
        num_requests, width = self.req_to_token.shape
        self.partition = Partition(num_requests, width, self.device)
        num_rows = partial_rows(self.num_heads, pool.head_num, self.rows.is_coded, self.num_sms)
        self._partials = Partials.allocate(num_rows, pool.v_head_dim, self.device)
        self._decode = self._make_decode_metadata(self.partition.num_requests)
        self._keys = torch.empty(
            compress.WORKSPACE_BYTES // pool.row_dtype.itemsize,
            dtype=pool.row_dtype,
            device=self.device,
        )
        self._scratch = torch.empty(
            compress.SCRATCH_BYTES // 4, dtype=torch.float32, device=self.device
        )
        token = pool.head_num, pool.head_dim, pool.v_head_dim, pool.row_dtype.itemsize
        tokens = expanded_tokens(*token, *self.req_to_token.shape)
        self._expanded_keys, self._expanded_values = (
            torch.empty(tokens, pool.head_num, dim, dtype=pool.row_dtype, device=self.device)
            for dim in (pool.head_dim, pool.v_head_dim)
        )

    def _make_decode_metadata(self, max_requests: int) -> ForwardMetadata:
        plan = decode.make_plan(
            self.partition,
            max_requests,
            self.num_heads,
            self._pools[0],
            self.num_sms,
            self._partials,
        )
        return ForwardMetadata(
            plan, torch.arange(max_requests + 1, dtype=torch.int32, device=self.device)
        )

    @property
    def _decode_plan(self) -> Plan:
        assert self._decode.plan is not None
        return self._decode.plan

    def _warm_up(self) -> None:
        """Compile the kernels of a prefill, which the first image would else wait for. The pools
        are still empty: what this writes, to the padding row, one visual row and one basis, nobody
        reads."""
        pool, pools = self.token_to_kv_pool, self._pools[0]
        first = pool.layout.first_visual_slot
        row = torch.zeros(
            1, self.num_heads, pool.head_dim, dtype=pool.row_dtype, device=self.device
        )
        values = row.new_zeros(1, pool.head_num, pool.v_head_dim)
        keys = row.new_zeros(1, 1, pool.head_num, pool.head_dim)
        workspace_row = torch.zeros(1, dtype=torch.int64, device=self.device)
        store(keys[0], values, workspace_row + first, pools, keys[0], workspace_row)
        if self.basis != "think":
            segments = compress.Segments.upload([(0, 1, 0)], self.device)
            weights = None
            if self.basis == "paper":
                weights = torch.ones(1, 1, pool.head_num, pool.head_dim, device=self.device)
            slots = torch.tensor([first], dtype=torch.int32, device=self.device)
            compressed = pool.compressed(slice(0, 1))
            errors = (
                keys.new_empty(1, 1, pool.head_num, 2, dtype=torch.float32)
                if self.rows.has_residual
                else None
            )
            compress.compress(
                keys,
                slots,
                segments,
                compressed,
                self._start_vectors,
                weights,
                self._scratch,
                errors,
            )
        one = torch.ones(1, dtype=torch.int32, device=self.device)
        self._rebuild(workspace_row, one, one, max_len=1)  # padding, which stays as it is
        for num_tokens in (1, extend.many_tokens(self.num_heads, pools, self.num_sms)):
            queries = row.expand(num_tokens, -1, -1).contiguous()
            out = queries.new_empty(num_tokens, self.num_heads, pool.v_head_dim)
            lse = torch.zeros(num_tokens, self.num_heads, device=self.device)
            q_indptr = torch.tensor([0, num_tokens], dtype=torch.int32, device=self.device)
            plan = self._extend_plan([num_tokens])
            extend.update_plan(plan, workspace_row, one)
            extend.extend(queries, out, lse, pools, plan, q_indptr, 1.0)
            if num_tokens == 1:
                extend.extend_stored(queries, pools, plan, q_indptr, 1.0)
        self._rebuild(workspace_row, 2 * one, one, max_len=2)
        kv_indptr = torch.tensor([0, 2], dtype=torch.int32, device=self.device)
        new = values.new_zeros(1, pool.head_num, pool.head_dim)
        widened = self._expanded_keys[:2], self._expanded_values[:2]
        expand.expand(
            pools, self.partition, workspace_row, one, q_indptr, kv_indptr, new, values, *widened, 2
        )

    # --- metadata ---------------------------------------------------------------------------------

    def shared_read_ends(self, forward_mode: Any) -> SharedReadEnds:
        """What the scheduler may overwrite is read where metadata is made, by no kernel of a
        layer."""
        return SharedReadEnds.PRE_REPLAY

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Graphs replay the one decode plan, which is as large as a batch can be, unless the host
        rounds up."""
        if max_bs > self._decode_plan.max_requests:
            self._decode = self._make_decode_metadata(max_bs)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Fill the buffers that captured graphs read; all that reads req_to_token happens here,
        before the replay."""
        self._init_decode(forward_batch)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        prefill = self._take_prefill(forward_batch)
        if forward_batch.forward_mode.is_decode_or_idle():
            self._init_decode(forward_batch)
        else:
            self._init_extend(forward_batch, prefill)

    def _init_decode(self, forward_batch: ForwardBatch) -> None:
        req_pool_indices, seq_lens = forward_batch.req_pool_indices, forward_batch.seq_lens
        stale, self._stale = self._stale, ()
        if len(stale):
            # The new token is in it already; to append it again is harmless.
            requests = upload(np.array(stale, dtype=np.int64), self.device)
            kv_lens = torch.zeros(
                self.partition.num_requests, dtype=torch.int32, device=self.device
            )
            kv_lens[req_pool_indices] = seq_lens.int()
            kv_lens = kv_lens[requests]
            self._rebuild(requests, kv_lens, kv_lens)
        decode.update_plan(self._decode_plan, req_pool_indices, seq_lens, self.req_to_token)
        self.forward_metadata = self._decode

    def _rebuild(
        self,
        req_pool_indices: torch.Tensor,
        kv_lens: torch.Tensor,
        prefix_lens: torch.Tensor,
        max_len: int | None = None,
    ) -> None:
        pools = self._pools[0]
        self.partition.rebuild(
            self.req_to_token, req_pool_indices, kv_lens, pools.slot_to_basis, len(pools.k_text),
            prefix_lens=prefix_lens, max_len=max_len,
        )  # fmt: skip

    def _extend_plan(self, extend_lens: list[int]) -> Plan:
        return extend.make_plan(
            self.partition,
            extend_lens,
            self.num_heads,
            self._pools[0],
            self.num_sms,
            self._partials,
        )

    def _init_extend(self, forward_batch: ForwardBatch, prefill: PrefillLayout | None) -> None:
        self._stale = ()  # every request of a prefill is rebuilt
        extend_lens = forward_batch.extend_seq_lens_cpu
        q_indptr = self._starts(forward_batch.extend_seq_lens)
        prefix_lens = forward_batch.extend_prefix_lens_cpu
        total_lens = [p + n for p, n in zip(prefix_lens, extend_lens, strict=True)]
        is_expanded = self._is_expanded(extend_lens, prefix_lens)
        is_few = sum(extend_lens) < extend.many_tokens(self.num_heads, self._pools[0], self.num_sms)
        is_stored = prefill is None and is_few and not is_expanded
        # Before the rebuild, which asks for the bases of the new slots.
        images = None if prefill is None else self._upload(prefill, forward_batch.out_cache_loc)
        seq_lens = forward_batch.seq_lens.int()
        kv_lens = seq_lens if is_stored else forward_batch.extend_prefix_lens.int()
        self._rebuild(forward_batch.req_pool_indices, seq_lens, kv_lens, max(total_lens))
        kv_plan = expansion = None
        if is_expanded:
            expansion = self._expansion(forward_batch, total_lens)
        elif is_stored or max(prefix_lens):
            kv_plan = self._extend_plan(extend_lens)
            extend.update_plan(kv_plan, forward_batch.req_pool_indices, kv_lens)
        if not is_stored:
            pool = self.token_to_kv_pool
            heads = (self.num_heads, pool.head_num, pool.head_dim, pool.v_head_dim)
            queries = keys = Ragged(q_indptr, extend_lens)
            if expansion is not None:
                keys = Ragged(expansion.kv_indptr, total_lens)
            self._own_chunk.plan(queries, keys, heads, pool.row_dtype)
        self.forward_metadata = ForwardMetadata(kv_plan, q_indptr, images, is_stored, expansion)

    def _is_expanded(self, extend_lens: list[int], prefix_lens: list[int]) -> bool:
        """Where the workspace does not hold a batch, extend.py needs none."""
        fits = sum(extend_lens) + sum(prefix_lens) <= len(self._expanded_keys)
        return (
            max(prefix_lens) > 0
            and fits
            and expand.is_faster(extend_lens, prefix_lens, self.rows.is_coded)
        )

    def _starts(self, lens: torch.Tensor) -> torch.Tensor:
        """Where each request's tokens start, and the last one's end, [bs + 1] int32."""
        starts = torch.zeros(len(lens) + 1, dtype=torch.int32, device=self.device)
        torch.cumsum(lens, 0, out=starts[1:])
        return starts

    def _expansion(self, forward_batch: ForwardBatch, total_lens: list[int]) -> Expansion:
        total = sum(total_lens)
        return Expansion(
            forward_batch.req_pool_indices,
            forward_batch.extend_prefix_lens.int(),
            self._starts(forward_batch.seq_lens),
            max(total_lens),
            self._expanded_keys[:total],
            self._expanded_values[:total],
        )

    def _upload(self, prefill: PrefillLayout, out_cache_loc: torch.Tensor) -> Images:
        """Also binds the slots to their bases: here, on the forward stream, never when they are
        allocated."""
        pool = self.token_to_kv_pool
        bounds, end = [], 0
        for segment in prefill.segments:
            bounds.append((end, end + len(segment.slots), segment.basis))
            end += len(segment.slots)
        slots = np.concatenate([segment.slots for segment in prefill.segments])
        bases = np.repeat(
            [basis for _, _, basis in bounds], [len(segment.slots) for segment in prefill.segments]
        )
        slots, bases = upload(np.stack([slots, bases]).astype(np.int32), self.device)
        first = pool.layout.first_visual_slot
        pool.slot_to_basis[slots - first] = bases
        layer_bytes = end * pool.head_num * pool.head_dim * pool.row_dtype.itemsize
        group = compress.layers_at_once(pool.layer_num, layer_bytes)
        errors = None
        if self.rows.has_residual:
            size = pool.layer_num, len(bounds), pool.head_num, 2
            errors = torch.empty(size, dtype=torch.float32, device=self.device)
        return Images(
            compress.Segments.upload(bounds, self.device),
            slots,
            (out_cache_loc >= first).cumsum(0) - 1,
            [slice(*segment.window) for segment in prefill.segments],
            self._key_workspace(group, end),
            [],
            errors,
            prefill,
        )

    def _key_workspace(self, num_layers: int, num_tokens: int) -> torch.Tensor:
        """[num_layers, num_tokens, H, D], of what is allocated unless one layer alone is larger."""
        pool = self.token_to_kv_pool
        size = num_layers * num_tokens * pool.head_num * pool.head_dim
        keys = self._keys if size <= len(self._keys) else self._keys.new_empty(size)
        return keys[:size].view(num_layers, num_tokens, pool.head_num, pool.head_dim)

    # --- layers -----------------------------------------------------------------------------------

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
        store(k, v, forward_batch.out_cache_loc, pools)
        assert metadata.plan is not None
        out = decode.decode(
            q, pools, metadata.plan, metadata.q_indptr, layer.scaling, layer.logit_cap
        )
        return out.flatten(1)

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
        if metadata.images is None:
            store(k, v, forward_batch.out_cache_loc, pools)
        else:
            index = layer.layer_id - self.token_to_kv_pool.start_layer
            self._compress(metadata.images, index, q, k, v, forward_batch.out_cache_loc)
        if metadata.is_stored:
            assert metadata.plan is not None
            return extend.extend_stored(
                q, pools, metadata.plan, metadata.q_indptr, layer.scaling, layer.logit_cap
            ).flatten(1)
        if (expansion := metadata.expansion) is not None:
            requests, prefix_lens, kv_indptr, max_len, keys, values = expansion
            expand.expand(
                pools,
                self.partition,
                requests,
                prefix_lens,
                metadata.q_indptr,
                kv_indptr,
                k,
                v,
                keys,
                values,
                max_len,
            )
            k, v = keys, values
        out, lse = self._own_chunk.run(q, k, v, layer.scaling, layer.logit_cap)
        if metadata.plan is not None:
            extend.extend(
                q, out, lse, pools, metadata.plan, metadata.q_indptr, layer.scaling, layer.logit_cap
            )
        return out.flatten(1)

    def _layer_pools(self, layer: RadixAttention) -> LayerPools:
        index = layer.layer_id - self.token_to_kv_pool.start_layer
        pools = self._pools[index]
        if layer.k_scale is not None and pools.k_scale != layer.k_scale_float:
            self._pools[index] = pools = self._scaled(pools, layer)
        return pools

    def _compress(
        self,
        images: Images,
        index: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out_cache_loc: torch.Tensor,
    ) -> None:
        """Store a layer; at the end of a group, or of the model, compress the group's Keys."""
        pool = self.token_to_kv_pool
        group = len(images.keys)
        at = index % group
        store(k, v, out_cache_loc, self._pools[index], images.keys[at], images.rows)
        if self.basis == "paper":
            windows = [paper.channel_weights(q[window], pool.head_num) for window in images.windows]
            images.weights.append(torch.stack(windows))
        elif self.basis == "think":
            self._select_channels(images, index, q)
            return
        if at + 1 < group and index + 1 < pool.layer_num:
            return
        timer = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        timer[0].record()
        compress.compress(
            images.keys[: at + 1],
            images.slots,
            images.segments,
            pool.compressed(slice(index - at, index + 1)),
            self._start_vectors,
            torch.stack(images.weights) if images.weights else None,
            self._scratch,
            None if images.errors is None else images.errors[index - at : index + 1],
        )
        timer[1].record()
        images.weights.clear()
        self._count_time(timer)
        if images.errors is not None and index + 1 == pool.layer_num:
            self._send_errors(images.errors, images.prefill)

    def _select_channels(self, images: Images, index: int, q: torch.Tensor) -> None:
        """The baseline `think`, in plain torch."""
        pools = self._pools[index]
        for (first, end, basis), window in zip(
            images.segments.bounds.tolist(), images.windows, strict=True
        ):
            keys = images.keys[index % len(images.keys), first:end]
            fitted = self.fit(keys, q[window], self.rows.rank)
            reference.store_keys(
                pools, images.slots[first:end] - len(pools.k_text), basis, fitted, keys
            )

    def _send_errors(self, errors: torch.Tensor, prefill: PrefillLayout) -> None:
        """``errors``: as Images has them."""
        means = self._over_ranks(errors.mean((0, 2)))
        of_segments = torch.empty(means.shape, dtype=means.dtype, pin_memory=True)
        of_segments.copy_(means, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._errors.append(Errors(of_segments, copied, prefill))
        self._settle_errors(wait=False)

    def _settle_errors(self, *, wait: bool = True) -> None:
        """Count the errors that have come, or ``wait`` for all: a limit must act at the same
        request on all ranks."""
        while self._errors and (wait or self._errors[0].copied.query()):
            errors = self._errors.popleft()
            errors.copied.synchronize()
            self._count_errors(errors.of_segments, errors.prefill.segments)

    def _count_time(self, timer: tuple[torch.cuda.Event, torch.cuda.Event]) -> None:
        """Add up the GPU time of compressions that are done, without waiting for any."""
        self._timers.append(timer)
        while self._timers and self._timers[0][1].query():
            start, end = self._timers.pop(0)
            self.stats.compress_seconds += start.elapsed_time(end) / 1000
