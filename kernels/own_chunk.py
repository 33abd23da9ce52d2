"""Causal attention of a chunk over Keys and Values side by side, its own or a prefix before them,
by the fastest kernel that SGLang installed here."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

FLASHINFER_WORKSPACE_BYTES = 128 << 20


class Ragged(NamedTuple):
    """Tokens of requests one after another: where each starts, [bs + 1] int32, and how many it has,
    on the CPU."""

    indptr: torch.Tensor
    lens: list[int]


class FlashAttention3:
    """FlashAttention-3 of sgl-kernel; Hopper."""

    def __init__(self, device: torch.device | str) -> None:
        from sgl_kernel.flash_attn import flash_attn_varlen_func, is_fa3_supported

        if not is_fa3_supported(device):
            raise RuntimeError("FlashAttention-3 does not support this GPU")
        self._attend = flash_attn_varlen_func

    def plan(
        self, q: Ragged, kv: Ragged, heads: tuple[int, int, int, int], dtype: torch.dtype
    ) -> None:
        self._indptrs, self._longest = (q.indptr, kv.indptr), (max(q.lens), max(kv.lens))

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float, logit_cap: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = self._attend(
            q, k, v, *self._indptrs, *self._longest, softmax_scale=sm_scale, causal=True,
            softcap=logit_cap, num_splits=0, return_softmax_lse=True,  # 0: as many as fill the GPU
        )  # fmt: skip
        return out, lse.T


class FlashInferRagged:
    """FlashInfer's ragged prefill."""

    def __init__(self, device: torch.device | str) -> None:
        from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

        workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrapper = BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
        self._arguments: tuple = ()
        self._planned: tuple[float, float] | None = None

    def plan(
        self, q: Ragged, kv: Ragged, heads: tuple[int, int, int, int], dtype: torch.dtype
    ) -> None:
        # FlashInfer plans on the CPU and would copy a device tensor back.
        starts = (
            torch.tensor([0, *x.lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            for x in (q, kv)
        )
        self._arguments, self._planned = (*starts, *heads), None
        self._dtype = dtype

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float, logit_cap: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._planned != (sm_scale, logit_cap):
            self._wrapper.plan(
                *self._arguments, causal=True, sm_scale=sm_scale, logits_soft_cap=logit_cap or None,
                q_data_type=self._dtype, kv_data_type=self._dtype,
            )  # fmt: skip
            self._planned = (sm_scale, logit_cap)
        out, lse = self._wrapper.run(q, k, v, return_lse=True)
        return out, lse * math.log(2)  # FlashInfer's is base 2


def workspace_bytes(device: torch.device | str) -> int:
    """Bytes that ``own_chunk_attention`` allocates on ``device``."""
    try:
        FlashAttention3(device)
    except (ImportError, OSError, RuntimeError):
        return FLASHINFER_WORKSPACE_BYTES
    return 0


def own_chunk_attention(device: torch.device | str) -> FlashAttention3 | FlashInferRagged:
    """FlashAttention-3 where it runs, else FlashInfer. Raises RuntimeError when neither does.

    ``plan(Ragged of the queries, of the Keys, (Hq, H, D, Dv), dtype)`` once a forward, then a
    layer's ``run(q [n, Hq, D], k [m, H, D], v [m, H, Dv], sm_scale, logit_cap)`` -> out
    [n, Hq, Dv], natural log-sum-exp [n, Hq] fp32. The queries of a request are the last of its m
    tokens.
    """
    reasons = []
    for kind in (FlashAttention3, FlashInferRagged):
        try:
            return kind(device)
        except (ImportError, OSError, RuntimeError) as error:
            reasons.append(f"{kind.__name__}: {error}")
    raise RuntimeError(
        f"RotateK found no attention kernel for new tokens ({'; '.join(reasons)}); reinstall "
        "sgl-kernel or flashinfer-python in the version that SGLang asks for."
    )
