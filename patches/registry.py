"""The radix cache ``rotatek`` in the host's registry, with its tier in host memory where the host's
flags ask for one."""

from __future__ import annotations

import logging

import torch
from sglang.srt.mem_cache.pool_host.base import host_memory_budget_bytes
from sglang.srt.mem_cache.registry import TreeCacheBuildContext
from sglang.srt.runtime_context import get_memory

from sglang_rotatek.config import RotateKError
from sglang_rotatek.memory.allocator import RotateKAllocator
from sglang_rotatek.memory.host import HostMemory, PinnedHostMemory
from sglang_rotatek.memory.layout import KVShape
from sglang_rotatek.memory.tier import HostTier
from sglang_rotatek.memory.tiered_tree import TieredRadixCache
from sglang_rotatek.memory.tree import RotateKRadixCache

logger = logging.getLogger(__name__)


def radix_cache(context: TreeCacheBuildContext) -> RotateKRadixCache:
    if not context.enable_hierarchical_cache:
        return RotateKRadixCache(context.params)
    return TieredRadixCache(context.params, _host_tier(context))


def _host_tier(context: TreeCacheBuildContext) -> HostTier:
    """By --hicache-size, in GB a rank, or --hicache-ratio, of the device's memory, which the host
    has lowered to what the machine has unless the user gave it."""
    allocator: RotateKAllocator = context.params.token_to_kv_pool_allocator
    pool, flags = allocator.get_kvcache(), get_memory()
    slab_bytes = pool.shape.slab_bytes
    if flags.hicache_size > 0:
        num_slabs = int(flags.hicache_size * 1e9) // slab_bytes
        flag = f"--hicache-size {flags.hicache_size}"
    else:
        num_slabs = int(pool.layout.num_slabs * flags.hicache_ratio)
        flag = f"--hicache-ratio {flags.hicache_ratio}"
    wanted = (1 + num_slabs) * slab_bytes
    available = host_memory_budget_bytes(wanted)
    if not num_slabs or wanted > available:
        raise RotateKError(
            f"{flag} asks for {wanted / 1e9:.2f} GB of host memory, expected at least a slab of "
            f"{slab_bytes / 1e9:.4f} GB and at most the {max(0, available) / 1e9:.2f} GB that are "
            "free; change it, or drop --enable-hierarchical-cache."
        )
    is_pinned = torch.device(allocator.device).type == "cuda"
    memory = (PinnedHostMemory if is_pinned else HostMemory)(pool.slabs, num_slabs)
    pool.register_layer_transfer_counter(memory)
    context.tp_worker.register_hicache_layer_transfer_counter(memory)
    tier = HostTier(context.params, allocator.slabs, memory, flags.hicache_write_policy)
    _log_capacity(tier, pool.shape)
    return tier


def _log_capacity(tier: HostTier, shape: KVShape) -> None:
    layout = tier.tree.layout
    host_bytes = layout.bytes(shape)
    stock_tokens = host_bytes // shape.full_row_bytes
    logger.info(
        "RotateK: host memory for %d text tokens, or up to %d image tokens, %s; %.3f GB, which "
        "would hold %d tokens in stock, %d with --kv-cache-dtype fp8_e4m3.",
        layout.text_slots,
        layout.visual_slots,
        tier.write_policy,
        host_bytes / (1 << 30),
        stock_tokens,
        stock_tokens * shape.dtype_bytes,
    )
