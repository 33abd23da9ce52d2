"""Attention backend ``rotatek`` on a GPU: the kernels, with plans that CUDA graphs replay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds
from sglang.srt.runtime_context import get_parallel

from ..config import RotateKError
from ..kernels import decode, expand, extend
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
from .compressor import ImageCompressor
from .metadata import Expansion, ForwardMetadata
from .warm_up import warm_up
from .workspace import expanded_tokens, partial_rows

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


FP8_CAPABILITY = (8, 9)


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
        self.pools = [pool.layer(pool.start_layer + i) for i in range(pool.layer_num)]
        self._own_chunk = own_chunk_attention(self.device)
        self._allocate()
        self.allocator.settle_errors = self.compressor.settle_errors
        warm_up(self)

    def _allocate(self) -> None:
        """What steps take beside the KV pool (workspace.py). Forwards follow each other on one
        stream, so they share it, and captured graphs may read it for ever."""
        pool = self.token_to_kv_pool
        num_requests, width = self.req_to_token.shape
        self.partition = Partition(num_requests, width, self.device)
        num_rows = partial_rows(self.num_heads, pool.head_num, self.rows.is_coded, self.num_sms)
        self._partials = Partials.allocate(num_rows, pool.v_head_dim, self.device)
        self._decode = self._make_decode_metadata(self.partition.num_requests)
        self.compressor = ImageCompressor(self)
        token = pool.head_num, pool.head_dim, pool.v_head_dim, pool.row_dtype.itemsize
        tokens = expanded_tokens(*token, *self.req_to_token.shape)
        self.expanded_keys, self.expanded_values = (
            torch.empty(tokens, pool.head_num, dim, dtype=pool.row_dtype, device=self.device)
            for dim in (pool.head_dim, pool.v_head_dim)
        )

    def _make_decode_metadata(self, max_requests: int) -> ForwardMetadata:
        plan = decode.make_plan(
            self.partition,
            max_requests,
            self.num_heads,
            self.pools[0],
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
            self.rebuild(requests, kv_lens, kv_lens)
        decode.update_plan(self._decode_plan, req_pool_indices, seq_lens, self.req_to_token)
        self.forward_metadata = self._decode

    def rebuild(
        self,
        req_pool_indices: torch.Tensor,
        kv_lens: torch.Tensor,
        prefix_lens: torch.Tensor,
        max_len: int | None = None,
    ) -> None:
        """See Partition.rebuild."""
        pools = self.pools[0]
        self.partition.rebuild(
            self.req_to_token, req_pool_indices, kv_lens, pools.slot_to_basis, len(pools.k_text),
            prefix_lens=prefix_lens, max_len=max_len,
        )  # fmt: skip

    def extend_plan(self, extend_lens: list[int]) -> Plan:
        """Of a prefill that is not expanded: see extend.make_plan."""
        return extend.make_plan(
            self.partition,
            extend_lens,
            self.num_heads,
            self.pools[0],
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
        is_few = sum(extend_lens) < extend.many_tokens(self.num_heads, self.pools[0], self.num_sms)
        is_stored = prefill is None and is_few and not is_expanded
        # Before the rebuild, which asks for the bases of the new slots.
        images = None
        if prefill is not None:
            images = self.compressor.prepare(prefill, forward_batch.out_cache_loc)
        seq_lens = forward_batch.seq_lens.int()
        kv_lens = seq_lens if is_stored else forward_batch.extend_prefix_lens.int()
        self.rebuild(forward_batch.req_pool_indices, seq_lens, kv_lens, max(total_lens))
        kv_plan = expansion = None
        if is_expanded:
            expansion = self._expansion(forward_batch, total_lens)
        elif is_stored or max(prefix_lens):
            kv_plan = self.extend_plan(extend_lens)
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
        fits = sum(extend_lens) + sum(prefix_lens) <= len(self.expanded_keys)
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
            self.expanded_keys[:total],
            self.expanded_values[:total],
        )

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
            self.compressor.store_layer(
                metadata.images, index, pools, q, k, v, forward_batch.out_cache_loc
            )
        if metadata.is_stored:
            assert metadata.plan is not None
            return extend.extend_stored(
                q, pools, metadata.plan, metadata.q_indptr, layer.scaling, layer.logit_cap
            ).flatten(1)
        if (expansion := metadata.expansion) is not None:
            requests, prefix_lens, kv_indptr, max_len, keys, values = expansion
            expand.expand(
                pools, self.partition, requests, prefix_lens, metadata.q_indptr, kv_indptr, k, v,
                keys, values, max_len,
            )  # fmt: skip
            k, v = keys, values
        out, lse = self._own_chunk.run(q, k, v, layer.scaling, layer.logit_cap)
        if metadata.plan is not None:
            extend.extend(
                q, out, lse, pools, metadata.plan, metadata.q_indptr, layer.scaling, layer.logit_cap
            )
        return out.flatten(1)

    def _layer_pools(self, layer: RadixAttention) -> LayerPools:
        index = layer.layer_id - self.token_to_kv_pool.start_layer
        pools = self.pools[index]
        if layer.k_scale is not None and pools.k_scale != layer.k_scale_float:
            self.pools[index] = pools = self._scaled(pools, layer)
        return pools
