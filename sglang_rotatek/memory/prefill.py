"""The layout of a prefill, carried from the scheduler to the attention backend."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Segment:
    """One segment of an extend batch: the batch's tokens [start, start + len(slots)).

    ``slots`` [n] int64; ``basis``: the slab of its basis; ``window``: the range of the batch's
    tokens whose queries the basis may look at; ``pad_ids``: token ids that tell its image, or ()
    where nobody asks for them.
    """

    start: int
    slots: np.ndarray
    basis: int
    window: tuple[int, int]
    pad_ids: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.start + len(self.slots)


@dataclass
class PrefillLayout:
    """Which tokens of an extend batch lie in visual rows. ``loaded``: slots [n] int64 and basis of
    segments, perhaps parts of some, that came from host memory and are to be bound before the
    forward looks at its prefixes."""

    num_tokens: int
    segments: list[Segment] = field(default_factory=list)
    loaded: list[tuple[np.ndarray, int]] = field(default_factory=list)

    def is_visual(self) -> np.ndarray:
        """Bool [num_tokens]."""
        mask = np.zeros(self.num_tokens, dtype=bool)
        for segment in self.segments:
            mask[segment.start : segment.end] = True
        return mask
