"""Counters of one server: what was compressed, what stayed at full width and why."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

TOO_SHORT = "shorter_than_min_image_tokens"
NOT_SMALLER = "no_smaller_when_narrow"
NO_SLABS = "no_room_for_images"
TOO_MANY_SEGMENTS = "too_many_segments_in_a_request"

REMEDIES = {
    TOO_SHORT: "harmless; --rotatek-min-image-tokens sets the limit",
    NOT_SMALLER: "harmless; a basis takes memory too",
    TOO_MANY_SEGMENTS: "larger images or chunks make fewer segments",
    NO_SLABS: "more KV memory, or a higher --rotatek-visual-fraction, gives images more room",
}


@dataclass
class Stats:
    """Counts since the start of the server; seconds are wall clock on the forward path.

    A request that is retracted and admitted again counts its images again, as it compresses them again.
    """

    images_compressed: int = 0
    segments_compressed: int = 0
    tokens_compressed: int = 0
    compress_seconds: float = 0.0
    segments_full_width: Counter = field(default_factory=Counter)
    prefixes_dropped: int = 0
    requests_stranded: int = 0
    integrity_checks: int = 0
    requests_mismatched: int = 0

    def full_width(self, reason: str, tokens: int) -> None:
        """Count an image or segment that keeps full-width Keys; logged the first time for each reason."""
        if not self.segments_full_width[reason]:
            logger.info(
                "RotateK: an image part of %d tokens stays at full width (%s): %s. Counted from now on in /server_info.",
                tokens,
                reason,
                REMEDIES[reason],
            )
        self.segments_full_width[reason] += 1

    def mismatched_images(self, rid: str, pictures: int, runs: int) -> None:
        """Count a request whose image runs are not the host's pictures; logged the first time."""
        if not self.requests_mismatched:
            logger.warning(
                "RotateK: request %s has %d pictures and %d runs of pad ids, which do not match: images may stay at full "
                "width or share a basis; answers stay right. Please report model and SGLang version. Counted from now on "
                "in /server_info.",
                rid,
                pictures,
                runs,
            )
        self.requests_mismatched += 1
