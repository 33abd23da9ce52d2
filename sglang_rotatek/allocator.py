"""Two free lists behind the host's allocator interface: text slots on the device, visual slots on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator

from .config import RotateKConfig
from .layout import PoolLayout
from .stats import Stats
from .visual_runs import VisualRuns
from .visual_slots import VisualSlots


@dataclass(frozen=True)
class Segment:
    """One segment of an extend batch: rows [start, start + len(slots)) of the batch's tokens.

    ``window`` is the range of batch rows whose queries the basis may look at.
    """

    start: int
    slots: np.ndarray
    basis: int
    window: tuple[int, int]

    @property
    def end(self) -> int:
        return self.start + len(self.slots)


@dataclass
class ExtendPlan:
    """Which rows of an extend batch take visual slots. Made on the CPU when the batch gets its slots."""

    num_tokens: int
    segments: list[Segment] = field(default_factory=list)

    @property
    def num_text_tokens(self) -> int:
        return self.num_tokens - sum(len(segment.slots) for segment in self.segments)

    def is_visual(self) -> np.ndarray:
        """Bool [num_tokens]."""
        mask = np.zeros(self.num_tokens, dtype=bool)
        for segment in self.segments:
            mask[segment.start : segment.end] = True
        return mask


class RotateKAllocator(TokenToKVPoolAllocator):
    """Hands out text slots, unless the batch has a plan that names visual slots for some of its rows.

    ``size`` and ``available_size()`` are sums over both pools, so the host's own leak check holds unchanged;
    whatever decides about memory must ask for the text pool (``text_available_size``) instead.
    """

    def __init__(self, layout: PoolLayout, config: RotateKConfig, dtype: torch.dtype, device: str, kvcache) -> None:
        self.layout = layout
        self.config = config
        self.visual = VisualSlots(layout)
        self.stats = Stats()
        self._plan: ExtendPlan | None = None
        self._freed_row: VisualRuns | None = None
        self._freed_row_is_locked = True
        super().__init__(layout.total_slots, dtype, device, kvcache, need_sort=False)

    def clear(self) -> None:
        super().clear()
        self.free_pages = torch.arange(1, self.layout.text_slots + 1, dtype=torch.int64, device=self.device)
        self.visual.clear()

    def text_available_size(self) -> int:
        return super().available_size()

    def available_size(self) -> int:
        return self.text_available_size() + self.visual.free

    def text_tokens_of(self, num_tokens: int) -> int:
        """Text slots that the next ``alloc(num_tokens)`` takes."""
        return self._plan.num_text_tokens if self._plan else num_tokens

    @contextmanager
    def planned(self, plan: ExtendPlan) -> Iterator[None]:
        """The one ``alloc`` inside this block follows ``plan``."""
        self._plan = plan
        try:
            yield
        finally:
            self._plan = None

    def alloc(self, need_size: int) -> torch.Tensor | None:
        plan = self._plan
        if plan is None or not plan.segments:
            return super().alloc(need_size)
        assert need_size == plan.num_tokens, f"batch of {need_size} tokens, plan for {plan.num_tokens}"
        text = super().alloc(plan.num_text_tokens)
        if text is None:
            return None
        # Built by slices: no boolean mask on the device, hence no wait for the forward in flight.
        parts, row, taken = [], 0, 0
        for segment in plan.segments:
            gap = segment.start - row
            slots = torch.from_numpy(segment.slots)
            parts += [text[taken : taken + gap], slots.to(self.device, non_blocking=True)]
            row, taken = segment.end, taken + gap
        return torch.cat([*parts, text[taken:]])

    @contextmanager
    def freeing(self, row: VisualRuns, *, locked: bool) -> Iterator[None]:
        """Inside this block ``free_segment`` frees parts of a token row whose visual slots are ``row``."""
        self._freed_row, self._freed_row_is_locked = row, locked
        try:
            yield
        finally:
            self._freed_row = None

    def free_segment(self, free_index: torch.Tensor, *, start_pos: int) -> None:
        """Free positions [start_pos, start_pos + n) of the row named by ``freeing``; without one, text slots."""
        end = start_pos + free_index.numel()
        text_from = start_pos
        for at, slots in self._freed_row.within(start_pos, end) if self._freed_row else ():
            self.free(free_index[text_from - start_pos : at - start_pos])
            self.visual.release(slots, locked=self._freed_row_is_locked)
            text_from = at + len(slots)
        self.free(free_index[text_from - start_pos :])

    def resize(self, config) -> None:
        raise RuntimeError("RotateK cannot resize its pools after start; unset SGLANG_ENABLE_POST_CAPTURE_KV_SIZING.")

    def check_integrity(self) -> None:
        """Raise AssertionError when a free list is not sound."""
        text = self.free_pages.cpu().numpy()
        assert len(np.unique(text)) == len(text), "a text slot is twice in the free list"
        if len(text):
            assert 1 <= text.min() and text.max() <= self.layout.text_slots, "the text free list holds a foreign slot"
        self.visual.check_integrity()
