"""The host's allocator interface over slabs. Requests get their rows from the tree (tree.py), which
knows who asks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
from sglang.srt.mem_cache.prefill_budget import PrefillBudget

from ..config import RotateKConfig
from ..stats import Stats
from .layout import PoolLayout
from .rows import Slabs

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.memory_pool import KVCache

    from ..metrics import RotateKGauges
    from .tree import RotateKRadixCache

DEBUG_ENVIRONMENT = "SGLANG_ROTATEK_DEBUG"


class RotateKPrefillBudget(PrefillBudget):
    """Budgets count text tokens; a slab counts as the text that it could hold. ``credit``: what the
    request that is being admitted takes less than the host believes, which counts all its tokens as
    text and no rest of a slab."""

    credit = 0

    def _available_and_evictable(self) -> int:
        return self.tree_cache.reachable_tokens + self.credit

    def refund(self, text_tokens: int) -> None:
        """Of an admitted request's reserve, give back what it does not take (negative: take
        more)."""
        self.total_offset -= text_tokens
        self.current_offset -= text_tokens


class InexactImages:
    """Pad ids of images whose narrow rows were further from exact than --rotatek-max-error; the
    latest MOST."""

    MOST = 1 << 16

    def __init__(self) -> None:
        self._pad_ids: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._pad_ids)

    def __contains__(self, token_id: object) -> bool:
        return token_id in self._pad_ids

    def add(self, pad_ids: Iterable[int]) -> None:
        for pad_id in pad_ids:
            self._pad_ids.pop(pad_id, None)
            self._pad_ids[pad_id] = None
        while len(self._pad_ids) > self.MOST:
            del self._pad_ids[next(iter(self._pad_ids))]


class RotateKAllocator(BaseTokenToKVPoolAllocator):
    """``size`` is the most tokens that fit and ``available_size()`` what is left of it, so the
    host's own leak check holds unchanged; whatever decides about memory asks for slabs instead."""

    def __init__(
        self,
        layout: PoolLayout,
        config: RotateKConfig,
        dtype: torch.dtype,
        device: str,
        kvcache: KVCache,
    ) -> None:
        super().__init__(layout.total_slots, 1, dtype, device, kvcache, need_sort=False)
        self.layout = layout
        self.config = config
        self.slabs = Slabs(layout)
        self.stats = Stats()
        self.inexact = InexactImages()
        # Replaced by a backend that learns errors later than its forward ends.
        self.settle_errors: Callable[[], None] = lambda: None
        # Set by the radix cache, which is made later.
        self.tree_cache: RotateKRadixCache | None = None
        self.gauges: RotateKGauges | None = None  # set where the host has metrics

    def clear(self) -> None:
        """The host clears the tree, which has the records, before."""
        self.slabs.clear()

    # --- what the scheduler asks ------------------------------------------------------------------

    def available_size(self) -> int:
        return self.size - self.slabs.text_tokens - self.slabs.visual_tokens

    def create_prefill_budget(
        self, tree_cache: RotateKRadixCache, *, num_mixed_decode_tokens: int = 0
    ) -> RotateKPrefillBudget:
        return RotateKPrefillBudget(
            self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens
        )

    def evict_to_free_tokens(self, tree_cache: RotateKRadixCache, num_tokens: int) -> None:
        tree_cache.make_room(-(-num_tokens // self.layout.text_rows))

    def check_decode_capacity(
        self,
        *,
        num_tokens: int,
        tree_cache: RotateKRadixCache,
        requests: Sequence[Req],
        spec_algorithm: Any = None,
    ) -> bool:
        """Whether each of ``requests`` can have a row more, when cached tokens go for it."""
        indices = np.array(
            [req.kv.req_pool_idx for req in requests if req.kv.holds_kv], dtype=np.int64
        )
        slabs = tree_cache.requests.slabs_for_decode(indices)
        tree_cache.make_room(slabs)
        return self.slabs.free >= slabs

    def verify_byte_accounting(self) -> list[str]:
        """The host asks when it is idle, and stops at any answer. Empty unless in debug mode."""
        if os.environ.get(DEBUG_ENVIRONMENT) != "1" or self.tree_cache is None:
            return []
        try:
            self.tree_cache.check_integrity_once()
        except AssertionError as error:
            return [f"RotateK: {error}"]
        return []

    # --- what only a feature that RotateK refuses would call --------------------------------------

    def alloc(self, need_size: int) -> NoReturn:
        _refuse("alloc")

    def free(self, free_index: torch.Tensor) -> None:
        _refuse("free")

    def resize(self, config: Any) -> None:
        raise RuntimeError(
            "RotateK cannot resize its pools after start; unset "
            "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING."
        )


def _refuse(method: str) -> NoReturn:
    raise RuntimeError(
        f"RotateKAllocator.{method} was called, but rows belong to requests and a number of tokens "
        "does not say whose; the host feature that calls it must be refused at start. Please "
        "report the server's flags."
    )
