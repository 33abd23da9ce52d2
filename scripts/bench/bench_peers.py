"""SGLang's attention kernels, called as its backends call them: what bench_kernels.py holds RotateK
to.

One class a kernel. ``decode(batch)`` and ``extend(batch)`` plan, and return
``launch(layer) -> output``; ``missing`` are the errors that mean "not installed here". Page size 1,
the whole context at full width, in bf16 or FP8 (e4m3).
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import torch
from bench_batches import BF16, DTYPE, HEAD_DIM, SM_SCALE, TOLERANCE, Batch, Storage

from sglang_rotatek.kernels.coded import FP8

Launch = Callable[[int], torch.Tensor]


class Peer:
    missing = (ImportError, OSError, RuntimeError, subprocess.SubprocessError)

    def __init__(self, storage: Storage = BF16) -> None:
        self.storage = storage
        self.tolerance = TOLERANCE if storage == BF16 else 0.2  # queries and weights are FP8 too


class FA3(Peer):
    """As flashattention_backend.py: forward_decode inside a CUDA graph, forward_extend outside.
    With an FP8 cache the queries are FP8 as well; their conversion, a kernel of its own, is not
    timed."""

    name = "fa3"

    def decode(self, batch: Batch) -> Launch:
        from sgl_kernel.flash_attn import get_scheduler_metadata

        model = batch.model
        # The backend's graph has a page table as wide as the model's context.
        page_table = torch.zeros(
            batch.size, model.context_len, dtype=torch.int32, device=batch.k.device
        )
        page_table[:, : batch.max_len] = batch.req_to_token
        metadata = get_scheduler_metadata(
            batch_size=batch.size, max_seqlen_q=1, max_seqlen_k=batch.max_len,
            num_heads=model.num_qo_heads, num_heads_k=model.num_kv_heads, headdim=HEAD_DIM,
            cache_seqlens=batch.seq_lens, qkv_dtype=self.storage.text, cu_seqlens_q=batch.qo_indptr,
            page_size=1, causal=True, has_softcap=False, num_splits=0,
        )  # fmt: skip
        return self._launch(batch, page_table, max_seqlen_q=1, scheduler_metadata=metadata)

    def extend(self, batch: Batch) -> Launch:
        return self._launch(
            batch,
            batch.req_to_token,
            max_seqlen_q=batch.new_tokens,
            cu_seqlens_k_new=batch.kv_indptr,
        )

    def _launch(self, batch: Batch, page_table: torch.Tensor, **more) -> Launch:
        from sglang.kernels.ops.attention.flash_attention import flash_attn_with_kvcache

        if self.storage.text == FP8:
            ones = torch.ones(batch.size, batch.model.num_kv_heads, device=batch.k.device)
            more |= {"k_descale": ones, "v_descale": ones}
        q, pools = batch.q.to(self.storage.text), batch.pools(self.storage)
        return lambda i: flash_attn_with_kvcache(
            q=q[i], k_cache=pools[i].k_text.unsqueeze(1), v_cache=pools[i].v_text.unsqueeze(1),
            page_table=page_table, cache_seqlens=batch.seq_lens, cu_seqlens_q=batch.qo_indptr,
            softmax_scale=SM_SCALE, causal=True, window_size=(-1, -1), softcap=0.0,
            return_softmax_lse=False, num_splits=0, out=None, ver=3, **more,
        )  # fmt: skip


class FlashInfer(Peer):
    """As flashinfer_backend.py: fa2 wrappers; multimodal models prefill with the paged one over
    prefix and chunk."""

    name = "flashinfer"
    workspace = None

    def _shared_workspace(self, batch: Batch) -> torch.Tensor:
        if self.workspace is None:
            from sglang.srt.environ import envs

            size = envs.SGLANG_FLASHINFER_WORKSPACE_SIZE.get()
            self.workspace = torch.zeros(size, dtype=torch.uint8, device=batch.k.device)
        return self.workspace

    def decode(self, batch: Batch) -> Launch:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper
        from sglang.srt.layers.attention.flashinfer_backend import should_use_tensor_core

        heads = (batch.model.num_qo_heads, batch.model.num_kv_heads)
        paged = (batch.kv_indptr, batch.kv_indices.int(), torch.ones_like(batch.seq_lens))
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            self._shared_workspace(batch), "NHD", backend="fa2", use_cuda_graph=True,
            use_tensor_cores=should_use_tensor_core(self.storage.text, *heads),
            paged_kv_indptr_buffer=paged[0], paged_kv_indices_buffer=paged[1],
            paged_kv_last_page_len_buffer=paged[2],
        )  # fmt: skip
        wrapper.begin_forward(
            *paged, *heads, HEAD_DIM, 1, data_type=self.storage.text, q_data_type=DTYPE,
            non_blocking=True
        )  # fmt: skip
        pools = batch.pools(self.storage)
        return lambda i: wrapper.forward(
            batch.q[i], pools[i][:2], sm_scale=SM_SCALE, logits_soft_cap=0.0
        )

    def extend(self, batch: Batch) -> Launch:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        heads = (batch.model.num_qo_heads, batch.model.num_kv_heads)
        wrapper = BatchPrefillWithPagedKVCacheWrapper(
            self._shared_workspace(batch), "NHD", backend="fa2"
        )
        wrapper.begin_forward(
            batch.qo_indptr, batch.kv_indptr, batch.kv_indices.int(),
            torch.ones_like(batch.seq_lens), *heads, HEAD_DIM, 1,
            q_data_type=DTYPE, kv_data_type=self.storage.text, non_blocking=True,
        )  # fmt: skip
        pools = batch.pools(self.storage)
        kwargs = {"causal": True, "sm_scale": SM_SCALE, "window_left": -1, "logits_soft_cap": 0.0}
        return lambda i: wrapper.forward(batch.q[i], pools[i][:2], **kwargs)


class SGLangTriton(Peer):
    """As triton_backend.py."""

    name = "sglang_triton"
    max_kv_splits = 8  # default of --triton-attention-num-kv-splits

    def decode(self, batch: Batch) -> Launch:
        from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
        from sglang.kernels.ops.attention.metadata import get_num_kv_splits_triton

        heads, splits = batch.model.num_qo_heads, self.max_kv_splits
        gpu = torch.cuda.get_device_properties(batch.k.device)
        logits = torch.zeros(batch.size, heads, splits, HEAD_DIM, device=batch.k.device)
        lse = torch.zeros(batch.size, heads, splits, device=batch.k.device)
        num_kv_splits = torch.empty_like(batch.seq_lens)
        get_num_kv_splits_triton[(1,)](
            num_kv_splits, batch.seq_lens, batch.size, 1, heads, batch.model.num_kv_heads, splits,
            gpu.multi_processor_count, MAX_NUM_SEQ=256,
        )  # fmt: skip

        def launch(i: int) -> torch.Tensor:
            out = torch.empty_like(batch.q[i])
            decode_attention_fwd(
                batch.q[i], batch.k[i], batch.v[i], out, batch.kv_indptr, batch.kv_indices, logits,
                lse, num_kv_splits, splits, SM_SCALE, 1.0, 1.0, logit_cap=0.0,
                use_pdl=gpu.major >= 9, page_size=1,
            )  # fmt: skip
            return out

        return launch

    def extend(self, batch: Batch) -> Launch:
        from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

        qo_indptr = batch.qo_indptr.long()

        def launch(i: int) -> torch.Tensor:
            out = torch.empty_like(batch.q[i])
            extend_attention_fwd(
                batch.q[i], batch.k_new[i], batch.v_new[i], out, batch.k[i], batch.v[i], qo_indptr,
                batch.prefix_indptr, batch.prefix_indices, None, True, None, batch.new_tokens, 1.0,
                1.0, SM_SCALE,
                logit_cap=0.0, sliding_window_size=-1, page_size=1,
            )  # fmt: skip
            return out

        return launch
