"""Build RotateK's pool and allocator where the host builds its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.allocation import ALLOC_FOR_DECODE_FUNCS
from sglang.srt.runtime_context import get_parallel

from sglang_rotatek.config import RotateKConfig, RotateKError
from sglang_rotatek.kernels.coded import FP8
from sglang_rotatek.memory.allocator import RotateKAllocator
from sglang_rotatek.memory.layout import KVShape, PoolLayout, layout_of_total
from sglang_rotatek.memory.pool import RotateKKVPool

from .allocation import alloc_for_decode
from .server_args import rotatek_config

if TYPE_CHECKING:
    from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
    from sglang.srt.mem_cache.memory_pool import KVCache

logger = logging.getLogger(__name__)
KV_DTYPES = (torch.bfloat16, torch.float16, torch.float32, FP8)


def kv_shape(kvc: KVCacheConfigurator, config: RotateKConfig) -> KVShape:
    """Shape of this rank's KV cache."""
    model = kvc.model_config
    if kvc.kv_cache_dtype not in KV_DTYPES:
        raise RotateKError(
            "--enable-rotatek needs a KV cache in bfloat16, float16, float32 or FP8 (e4m3), but "
            f"--kv-cache-dtype auto took {kvc.kv_cache_dtype} from the checkpoint; add "
            "--kv-cache-dtype bfloat16, or drop --enable-rotatek."
        )
    shape = KVShape(
        num_layers=kvc.layer_info.num_effective_layers,
        num_kv_heads=model.get_num_kv_heads(get_parallel().attn_tp_size),
        head_dim=model.head_dim,
        v_head_dim=model.v_head_dim,
        rows=config.row_format(model.head_dim, model.v_head_dim),
        kv_bytes=kvc.kv_cache_dtype.itemsize,
        dtype_bytes=row_dtype(kvc).itemsize,
    )
    if shape.visual_row_bytes > shape.text_row_bytes:
        raise RotateKError(
            f"--enable-rotatek would store an image token in {shape.visual_row_bytes} bytes, more "
            f"than the {shape.text_row_bytes} of a text token in --kv-cache-dtype fp8_e4m3; use "
            "--rotatek-key-bits 4 with --rotatek-value-bits 4, or drop the FP8."
        )
    return shape


def row_dtype(kvc: KVCacheConfigurator) -> torch.dtype:
    """Of what visual rows and bases keep in 16 bits: FP8 is for text alone."""
    return kvc.model_dtype if kvc.kv_cache_dtype == FP8 else kvc.kv_cache_dtype


def build_mha_kv_pool(
    original: Callable[..., KVCache],
    kvc: KVCacheConfigurator,
    *,
    max_total_num_tokens: int,
    mha_pool_class: type[KVCache],
    quant_method: Any = None,
) -> KVCache:
    config = rotatek_config(kvc.server_args)
    if config is None:
        return original(
            kvc,
            max_total_num_tokens=max_total_num_tokens,
            mha_pool_class=mha_pool_class,
            quant_method=quant_method,
        )
    shape = kv_shape(kvc, config)
    layout = layout_of_total(max_total_num_tokens, config, shape)
    if not layout.max_visual_slabs:
        raise RotateKError(
            f"The KV memory holds {layout.text_slots} tokens, of which --rotatek-visual-fraction "
            f"{config.visual_fraction} leaves no image a slot; give the KV cache more memory."
        )
    pool = RotateKKVPool(
        layout,
        shape,
        row_dtype(kvc),
        page_size=1,
        dtype=kvc.kv_cache_dtype,
        head_num=shape.num_kv_heads,
        head_dim=shape.head_dim,
        v_head_dim=shape.v_head_dim,
        layer_num=shape.num_layers,
        device=kvc.device,
        enable_memory_saver=False,
        start_layer=kvc.layer_info.start_layer,
        end_layer=kvc.layer_info.end_layer,
    )
    _log_capacity(layout, shape, config.basis)
    return pool


def _log_capacity(layout: PoolLayout, shape: KVShape, basis: str) -> None:
    pool_bytes, rows = layout.bytes(shape), shape.rows
    stock_tokens = pool_bytes // shape.full_row_bytes
    logger.info(
        "RotateK: memory for %d text tokens, or up to %d image tokens beside less text; an image "
        "token takes %d bytes a layer and KV head: %s of %d, basis %s, Values of %d bits; %.3f GB, "
        "which would hold %d tokens in stock, %d with --kv-cache-dtype fp8_e4m3.",
        layout.text_slots,
        layout.visual_slots,
        rows.row_bytes(shape.head_dim, shape.v_head_dim, shape.dtype_bytes),
        f"8-bit Keys of rank {rows.rank} and a residual of {rows.key_bits} bits"
        if rows.has_residual
        else f"Keys of rank {rows.rank}",
        shape.head_dim,
        basis,
        rows.value_bits,
        pool_bytes / (1 << 30),
        stock_tokens,
        stock_tokens * shape.dtype_bytes,
    )


def build_token_to_kv_pool_allocator(
    original: Callable[..., BaseTokenToKVPoolAllocator], kvc: KVCacheConfigurator, **kwargs: Any
) -> BaseTokenToKVPoolAllocator:
    config = rotatek_config(kvc.server_args)
    if config is None:
        return original(kvc, **kwargs)
    pool = kwargs["token_to_kv_pool"]
    if not isinstance(pool, RotateKKVPool):
        raise RotateKError(
            "--enable-rotatek needs a plain multi-head KV pool, but this model gets a "
            f"{type(pool).__name__}; serve a model without sliding-window, latent or state-space "
            "layers, or drop --enable-rotatek."
        )
    ALLOC_FOR_DECODE_FUNCS[torch.device(kvc.device).type] = alloc_for_decode
    return RotateKAllocator(pool.layout, config, kvc.kv_cache_dtype, kvc.device, pool)
