"""Bytes to tokens: narrow Keys make the same bytes hold more of them."""

from __future__ import annotations

from sglang.srt.model_executor.pool_configurator import DefaultPoolConfigurator, MemoryPoolConfig

from sglang_rotatek.memory.layout import KVShape, layout_of_bytes

from .kv_cache_configurator import kv_shape
from .server_args import rotatek_config


class RotateKPoolConfigurator(DefaultPoolConfigurator):
    """A token limit means the bytes of that many full-width tokens."""

    def __init__(self, kvc) -> None:
        super().__init__(kvc)
        self._config = rotatek_config(kvc.server_args)
        self._shape: KVShape = kv_shape(kvc)
        self._available_bytes: int | None = None

    def calculate_pool_sizes(self, available_bytes: int, page_size: int) -> MemoryPoolConfig:
        self._available_bytes = available_bytes
        return self._pool_config(available_bytes)

    def calculate_pool_sizes_from_max_tokens(self, max_total_num_tokens: int, page_size: int) -> MemoryPoolConfig:
        wanted = max_total_num_tokens * self._shape.text_row_bytes
        return self._pool_config(wanted if self._available_bytes is None else min(wanted, self._available_bytes))

    def _pool_config(self, budget_bytes: int) -> MemoryPoolConfig:
        return MemoryPoolConfig(max_total_num_tokens=layout_of_bytes(budget_bytes, self._config, self._shape).total_slots)


def create_memory_pool_configurator(original, kvc):
    if rotatek_config(kvc.server_args) is None:
        return original(kvc)
    return RotateKPoolConfigurator(kvc)
