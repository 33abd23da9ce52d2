"""Text slots on the device, visual slots on the CPU, both of one stock of slabs, behind the host's allocator interface."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.prefill_budget import PrefillBudget

from ..config import RotateKConfig
from ..kernels.upload import upload
from .layout import PoolLayout
from .slabs import Slabs
from ..stats import Stats
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


class RotateKPrefillBudget(PrefillBudget):
    """Budgets count text slots; a slab counts as the text that it could hold. ``credit``: what the request that is being
    admitted takes less than the host believes, which counts all its tokens as text."""

    credit = 0

    def _available_and_evictable(self) -> int:
        return self.tree_cache.text_reachable_size() + self.credit

    def refund(self, text_slots: int) -> None:
        """Of an admitted request's reserve, give back what it does not take (negative: take more)."""
        self.total_offset -= text_slots
        self.current_offset -= text_slots


DEBUG_ENVIRONMENT = "SGLANG_ROTATEK_DEBUG"
# A step of decoding takes a slot for each request; slabs for it are taken some steps ahead while they are plenty.
SLABS_AHEAD = 64


class RotateKAllocator(TokenToKVPoolAllocator):
    """Hands out text slots, unless the batch has a plan that names visual slots for some of its rows.

    ``size`` is the most tokens that fit and ``available_size()`` what is left of it, so the host's own leak check holds
    unchanged; whatever decides about memory must ask for text slots (``text_available_size``) or slabs instead. The
    free list is the host's: it holds the free rows of the slabs that are text's at the time.
    """

    def __init__(self, layout: PoolLayout, config: RotateKConfig, dtype: torch.dtype, device: str, kvcache) -> None:
        self.layout = layout
        self.config = config
        self.slabs = Slabs(layout)
        self.visual = VisualSlots(layout, self.slabs)
        self.stats = Stats()
        self._plan: ExtendPlan | None = None
        self._freed_row: VisualRuns | None = None
        self._freed_row_is_locked = True
        self.tree_cache = None  # set by the radix cache, which is made later
        self.gauges = None  # set where the host has metrics
        super().__init__(layout.total_slots, dtype, device, kvcache, need_sort=False)

    def clear(self) -> None:
        super().clear()
        self.free_pages = torch.empty(0, dtype=torch.int64, device=self.device)
        self.slabs.clear()
        self.visual.clear()
        self._text_slabs = np.zeros(1 + self.layout.num_slabs, dtype=bool)
        self._freed_since_look = 0

    # --- what the scheduler asks -------------------------------------------------------------------------

    def create_prefill_budget(self, tree_cache, *, num_mixed_decode_tokens: int = 0) -> RotateKPrefillBudget:
        return RotateKPrefillBudget(self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)

    def evict_to_free_tokens(self, tree_cache, num_tokens: int) -> None:
        """Evict for what the next ``alloc(num_tokens)`` takes: text slots, the only kind that it can run short of."""
        tree_cache.make_room(text=self.text_tokens_of(num_tokens))

    def check_decode_capacity(self, *, num_tokens: int, tree_cache, requests=None, spec_algorithm=None) -> bool:
        tree_cache.make_room(text=num_tokens)
        return self.text_available_size() >= num_tokens

    def verify_byte_accounting(self) -> list[str]:
        """The host asks when it is idle, and stops at any answer. Empty unless in debug mode."""
        if os.environ.get(DEBUG_ENVIRONMENT) != "1" or self.tree_cache is None:
            return []
        try:
            self.tree_cache.check_integrity_once()
        except AssertionError as error:
            return [f"RotateK: {error}"]
        return []

    # --- slots ------------------------------------------------------------------------------------------

    def text_available_size(self) -> int:
        """Text slots that ``alloc`` can give at once."""
        return super().available_size() + self.slabs.free * self.layout.text_rows

    @property
    def text_slabs(self) -> int:
        return self.layout.num_slabs - self.slabs.free - self.visual.used_slabs

    @property
    def text_used(self) -> int:
        return self.text_slabs * self.layout.text_rows - super().available_size()

    def available_size(self) -> int:
        return self.size - self.text_used - self.visual.used

    def _add_text_slabs(self, need_size: int) -> None:
        """Give text as many slabs as the next ``need_size`` slots take."""
        short = need_size - len(self.free_pages)
        if short <= 0:
            return
        rows = self.layout.text_rows
        count = min(max(-(-short // rows), min(SLABS_AHEAD, self.slabs.free // SLABS_AHEAD)), self.slabs.free)
        slabs = self.slabs.take(count)
        self._text_slabs[slabs] = True
        self._freed_since_look += count * rows
        slots = (slabs[:, None] * rows + np.arange(rows)).ravel()
        self.free_pages = torch.cat((self.free_pages, upload(slots, self.device)))

    def take_back_text_slabs(self, wanted: int) -> None:
        """Free the slabs of which text uses no slot, if that may give ``wanted`` of them.

        It reads the free list from the device. After a look no slab is empty, so ``wanted`` slabs can only be after as
        many slots were freed; before that there is no other look.
        """
        rows = self.layout.text_rows
        if len(self.free_pages) < wanted * rows or self._freed_since_look < wanted:
            return
        self._freed_since_look = 0
        slots = self.free_pages.cpu().numpy()
        count = np.bincount(slots // rows, minlength=1 + self.layout.num_slabs)
        empty = np.flatnonzero(count == rows)
        left = np.sort(slots[count[slots // rows] < rows])
        self.free_pages = upload(left, self.device)
        self._text_slabs[empty] = False
        self.slabs.give(empty)
        self.stats.text_slabs_taken_back += len(empty)

    def free(self, free_index: torch.Tensor) -> None:
        super().free(free_index)
        if self.free_group is None:
            self._freed_since_look += free_index.numel()

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
        num_text_tokens = self.text_tokens_of(need_size)
        self._add_text_slabs(num_text_tokens)
        if plan is None or not plan.segments:
            return super().alloc(need_size)
        assert need_size == plan.num_tokens, f"batch of {need_size} tokens, plan for {plan.num_tokens}"
        text = super().alloc(num_text_tokens)
        if text is None:
            return None
        # Built by slices: no boolean mask on the device, hence no wait for the forward in flight.
        parts, row, taken = [], 0, 0
        for segment in plan.segments:
            gap = segment.start - row
            parts += [text[taken : taken + gap], upload(segment.slots, self.device)]
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
        layout = self.layout
        free = self.free_pages.cpu().numpy()
        assert len(np.unique(free)) == len(free), "a text slot is twice in the free list"
        assert self._text_slabs[free // layout.text_rows].all(), "a free text slot is not of a text slab"
        owners = np.zeros(1 + layout.num_slabs, dtype=np.int64)
        owners[0] = 1  # padding
        for slabs in (self.slabs.free_ids(), np.flatnonzero(self._text_slabs), self.visual.used_slab_ids()):
            np.add.at(owners, slabs, 1)
        assert (owners == 1).all(), "a slab has no owner, or two"
        assert self.text_slabs == self._text_slabs.sum(), "text slabs are miscounted"
        self.visual.check_integrity()
