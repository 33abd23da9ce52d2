"""What of the host's arguments and environment RotateK cannot serve together with, and why."""

from __future__ import annotations

import os
from typing import Any

import torch
from sglang.srt.model_executor.cuda_graph_config import Backend

from sglang_rotatek.config import RotateKConfig, RotateKError

BACKEND = "rotatek"
# (field, values that are fine, why). Host features that read Keys by slot, move slots, or reshape
# batches.
_NEEDS_FULL_KEYS = "it reads full-width Keys by slot, and image tokens have none"
_OWN_POOLS = "it brings KV pools of its own"
_BY_SLOT = "it indexes a buffer by slots, of whose ids there are more than tokens"
_OTHER_FRONT_END = "requests would go past RotateK's checks"
_OTHER_BATCHES = "it splits or pads batches after their slots are chosen"
REFUSED = (
    ("attention_backend", (None, BACKEND), "only the rotatek backend can read narrow rows"),
    ("prefill_attention_backend", (None, BACKEND), "only the rotatek backend can read narrow rows"),
    ("decode_attention_backend", (None, BACKEND), "only the rotatek backend can read narrow rows"),
    ("radix_cache_backend", (None, BACKEND), "only the rotatek radix cache knows narrow rows"),
    ("disable_radix_cache", (False,), "RotateK's bookkeeping is in the radix cache"),
    ("page_size", (None, 1), "image segments do not fall on page boundaries"),
    ("kv_cache_dtype", ("auto", "bfloat16", "bf16", "fp8_e4m3"), "text rows know no other format"),
    ("speculative_algorithm", (None,), _NEEDS_FULL_KEYS),
    ("hicache_storage_backend", (None,), "a third tier stores pages of equal tokens"),
    ("enable_lmcache", (False,), _NEEDS_FULL_KEYS),
    ("enable_flexkv", (False,), _NEEDS_FULL_KEYS),
    ("disaggregation_mode", ("null",), _NEEDS_FULL_KEYS),
    ("disaggregation_decode_enable_offload_kvcache", (False,), _NEEDS_FULL_KEYS),
    ("disaggregation_decode_retraction_backup", (None, "cpu_tensor", "none"), _NEEDS_FULL_KEYS),
    ("enable_unified_cache_external_linker", (False,), _NEEDS_FULL_KEYS),
    ("encoder_only", (False,), _NEEDS_FULL_KEYS),
    ("language_only", (False,), _NEEDS_FULL_KEYS),
    (
        "enable_deterministic_inference",
        (False,),
        "its extend kernel reads the chunk's own Keys from the pool",
    ),
    ("kv_canary", (None, "none"), _NEEDS_FULL_KEYS),
    ("attn_dp_size", (1,), _OTHER_BATCHES),
    ("pp_size", (1,), _OTHER_BATCHES),
    ("attn_cp_size", (1,), _OTHER_BATCHES),
    ("dcp_size", (1,), _OWN_POOLS),
    ("enable_prefill_cp", (False,), _OTHER_BATCHES),
    ("enable_two_batch_overlap", (False,), _OTHER_BATCHES),
    ("enable_pdmux", (False,), _OTHER_BATCHES),
    ("enable_mixed_chunk", (False,), _OTHER_BATCHES),
    ("enable_unified_memory", (False,), _OWN_POOLS),
    ("enable_kv_cache_sharding", (False,), _OWN_POOLS),
    ("enable_page_major_kv_layout", (False,), _OWN_POOLS),
    ("enable_hisparse", (False,), _OWN_POOLS),
    ("enable_session_radix_cache", (False,), "it needs another radix cache"),
    ("radix_eviction_policy", ("lfu", "slru", "priority", "lru"), "it needs another radix cache"),
    (
        "schedule_policy",
        ("lpm", "random", "dfs-weight", "lof", "priority", "routing-key", "hrrn", "fcfs"),
        "it cuts chunks after their memory is chosen",
    ),
    (
        "cuda_graph_backend_prefill",
        (None, "disabled"),
        "compression is decided anew for every prefill",
    ),
    ("enable_streaming_session", (False,), "it trims cached rows by position"),
    ("strip_thinking_cache", (False,), "it trims cached rows by position"),
    ("enable_memory_saver", (False,), "RotateK's memory is not in its region"),
    ("prefill_only_disable_kv_cache", (False,), "there is no KV cache to narrow"),
    ("is_embedding", (False,), "there is no decode to speed up"),
    ("dllm_algorithm", (None,), "its forward modes are not supported"),
    ("enable_mis", (False,), "its attention masks are not supported"),
    ("enable_torch_compile", (False,), "it is not tested together"),
    ("use_ray", (False,), "it starts schedulers on another path"),
    ("enable_return_routed_experts", (False,), _BY_SLOT),
    ("enable_return_indexer_topk", (False,), _BY_SLOT),
    ("smg_grpc_mode", (False,), _OTHER_FRONT_END),
    ("grpc_mode", (False,), _OTHER_FRONT_END),
    (
        "model_impl",
        ("auto", "sglang"),
        "the Transformers implementation has no radix cache for images",
    ),
)
# Of --enable-hierarchical-cache; nothing reads them without.
REFUSED_OF_A_TIER = (
    ("hicache_host_memory_mode", ("cache",), "a third tier stores pages of equal tokens"),
    (
        "hicache_mem_layout",
        ("page_first", "layer_first"),
        "host memory holds slabs as the device does",
    ),
    ("hicache_io_backend", ("kernel",), "host memory holds slabs as the device does"),
)
# Environment variable -> why.
REFUSED_ENVIRONMENT = {
    "SGLANG_USE_HND_KVCACHE": _OWN_POOLS,
    "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": _OWN_POOLS,
    "SGLANG_RUST_SERVER": _OTHER_FRONT_END,
    "SGLANG_ENABLE_METADATA_GLUE_GRAPH": "it replays what a decode step must make anew",
}
VIT_GRAPHS = "SGLANG_VIT_ENABLE_CUDA_GRAPH"


def refuse_unsupported(args: Any, config: RotateKConfig) -> None:
    """Raise RotateKError for the first host feature that RotateK cannot serve together with.
    ``args``: the record, or the view of its resolved values; ``config``: RotateK's of it."""
    of_a_tier = REFUSED_OF_A_TIER if args.enable_hierarchical_cache else ()
    for name, fine, why in REFUSED + of_a_tier:
        value = getattr(args, name)
        if value not in fine:
            flag = "--" + name.replace("_", "-")
            found = flag if value is True else f"{flag} {value}"
            wanted = "leave it out" if fine[0] in (None, False) else f"use {flag} {fine[-1]}"
            raise RotateKError(
                f"--enable-rotatek does not work with {found}: {why}; {wanted}, or drop "
                "--enable-rotatek."
            )
    for name, why in REFUSED_ENVIRONMENT.items():
        if _is_on(name):
            raise RotateKError(
                f"--enable-rotatek does not work with {name}={os.environ[name]}: {why}; unset it, "
                "or drop --enable-rotatek."
            )
    if config.prunes_by_attention:
        _refuse_hidden_attention(args)


def _refuse_hidden_attention(args: Any) -> None:
    """Raise RotateKError where tokens are to be pruned by the attention of a vision tower that does
    not show it."""
    if args.mm_enable_dp_encoder:
        found, wanted = "--mm-enable-dp-encoder", "leave it out"
    elif _is_on(VIT_GRAPHS):
        found, wanted = f"{VIT_GRAPHS}={os.environ[VIT_GRAPHS]}", "unset it"
    else:
        return
    raise RotateKError(
        f"--rotatek-token-pruner visionzip does not work with {found}: the attention of the vision "
        f"tower is out of reach there; {wanted}, or use --rotatek-token-pruner divprune."
    )


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "y")


def refuse_device(view: Any) -> None:
    """Raise RotateKError for resolved arguments of a device without kernels of ours, or with
    prefill CUDA graphs."""
    device = "rocm" if view.device == "cuda" and torch.version.hip else view.device
    if device not in ("cuda", "cpu"):
        raise RotateKError(
            f"--enable-rotatek runs on NVIDIA GPUs, and on the CPU for tests, found {device}; use "
            "one, or drop --enable-rotatek."
        )
    prefill_graphs = view.cuda_graph_config and view.cuda_graph_config.prefill.backend
    if prefill_graphs not in (None, Backend.DISABLED):
        raise RotateKError(
            f"--enable-rotatek does not work with prefill CUDA graphs, found {prefill_graphs}: "
            "compression is decided anew for every prefill; add --disable-prefill-cuda-graph, or "
            "drop --enable-rotatek."
        )
