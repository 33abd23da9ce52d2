"""Bytes to tokens: narrow Keys make the same bytes hold more of them, and attention needs some of
the bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from sglang.srt.mem_cache.allocation_sizing import get_req_to_token_extra_context_len
from sglang.srt.model_executor.pool_configurator import DefaultPoolConfigurator, MemoryPoolConfig
from sglang.srt.runtime_context import get_parallel, get_schedule

from sglang_rotatek.attention.workspace import workspace_bytes
from sglang_rotatek.config import RotateKConfig
from sglang_rotatek.kernels import own_chunk
from sglang_rotatek.memory.layout import KVShape, layout_of_bytes

from .kv_cache_configurator import kv_shape
from .server_args import rotatek_config

if TYPE_CHECKING:
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
    from sglang.srt.model_executor.pool_configurator import MemoryPoolConfigurator


class RotateKPoolConfigurator(DefaultPoolConfigurator):
    """A token limit means the bytes of that many full-width tokens."""

    def __init__(self, kvc: KVCacheConfigurator, config: RotateKConfig) -> None:
        super().__init__(kvc)
        self._kvc = kvc
        self._config = config
        self._shape: KVShape = kv_shape(kvc, config)
        self._available_bytes: int | None = None

    def calculate_pool_sizes(self, available_bytes: int, page_size: int) -> MemoryPoolConfig:
        self._available_bytes = available_bytes - self._workspace_bytes(available_bytes)
        return self._pool_config(self._available_bytes)

    def calculate_pool_sizes_from_max_tokens(
        self, max_total_num_tokens: int, page_size: int
    ) -> MemoryPoolConfig:
        wanted = max_total_num_tokens * self._shape.text_row_bytes
        return self._pool_config(
            wanted if self._available_bytes is None else min(wanted, self._available_bytes)
        )

    def _pool_config(self, budget_bytes: int) -> MemoryPoolConfig:
        layout = layout_of_bytes(max(0, budget_bytes), self._config, self._shape)
        return MemoryPoolConfig(max_total_num_tokens=layout.total_slots)

    def _workspace_bytes(self, available_bytes: int) -> int:
        """What the GPU backend allocates at start beside the pool, for as many requests as the host
        may run."""
        kvc = self._kvc
        if torch.device(kvc.device).type != "cuda":
            return 0
        model, chunk_tokens = kvc.model_config, get_schedule().chunked_prefill_size or -1
        most_tokens = layout_of_bytes(available_bytes, self._config, self._shape).total_slots
        bytes_ = workspace_bytes(
            self._shape,
            num_requests=1 + kvc.resolve_max_num_reqs(most_tokens),
            width=model.context_len + get_req_to_token_extra_context_len(),
            num_heads=model.num_attention_heads // get_parallel().attn_tp_size,
            max_extend_tokens=chunk_tokens if chunk_tokens > 0 else model.context_len,
            num_sms=torch.cuda.get_device_properties(kvc.device).multi_processor_count,
        )
        return bytes_ + own_chunk.workspace_bytes(kvc.device)


def create_memory_pool_configurator(
    original: Callable[[KVCacheConfigurator], MemoryPoolConfigurator], kvc: KVCacheConfigurator
) -> MemoryPoolConfigurator:
    config = rotatek_config(kvc.server_args)
    return original(kvc) if config is None else RotateKPoolConfigurator(kvc, config)
