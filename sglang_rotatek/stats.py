"""Counters of one server: what was compressed, what stayed at full width and why."""

from __future__ import annotations

import logging
from collections import Counter, deque
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

TOO_SHORT = "shorter_than_min_image_tokens"
NOT_SMALLER = "no_smaller_when_narrow"
NO_SLABS = "no_room_for_images"
TOO_MANY_SEGMENTS = "too_many_segments_in_a_request"
INEXACT = "narrow_keys_were_too_inexact"

VIDEO = "video"
PRECOMPUTED = "precomputed_embeddings"
IN_PIECES = "not_one_picture_in_one_run"
OTHER_LENGTH = "placeholders_do_not_match_its_size"
TOO_SMALL = "too_small"

REMEDIES = {
    TOO_SHORT: "harmless; --rotatek-min-image-tokens sets the limit",
    NOT_SMALLER: "harmless; narrow it would take no less memory",
    TOO_MANY_SEGMENTS: "larger images or chunks make fewer segments",
    INEXACT: "--rotatek-max-error sets the limit; more key bits are closer to exact",
    NO_SLABS: "more KV memory, or a higher --rotatek-visual-fraction, gives images more room",
    VIDEO: "harmless; pruning knows pictures alone",
    PRECOMPUTED: "send the picture instead of its embeddings",
    IN_PIECES: "send each picture as one, and not as ready embeddings",
    OTHER_LENGTH: "please report model and SGLang version",
    TOO_SMALL: "harmless; so few tokens all stay",
}


@dataclass
class SegmentErrors:
    """Of compressed segments, means over layers and this rank's KV heads: ``key_error``, the
    squared error of the stored Keys, and ``residual_energy``, what the principal components leave,
    both as a share of the centred Keys' energy. ``new``: key errors that no histogram has counted
    yet, the latest only where none does."""

    segments: int = 0
    key_error_sum: float = 0.0
    key_error_max: float = 0.0
    residual_energy_sum: float = 0.0
    new: deque[float] = field(default_factory=lambda: deque(maxlen=4096))

    def add(self, residual_energy: float, key_error: float) -> None:
        self.segments += 1
        self.key_error_sum += key_error
        self.key_error_max = max(self.key_error_max, key_error)
        self.residual_energy_sum += residual_energy
        self.new.append(key_error)

    def summary(self) -> dict[str, float]:
        """For /server_info; zeros before the first segment."""
        count = max(self.segments, 1)
        return {
            "segments_measured": self.segments,
            "key_error_mean": self.key_error_sum / count,
            "key_error_max": self.key_error_max,
            "residual_energy_mean": self.residual_energy_sum / count,
        }


@dataclass
class Stats:
    """Counts since the start of the server; seconds are wall clock on the forward path.
    ``tokens_pruned``: of images when those that stay were chosen, which later requests go by.
    ``images_not_pruned``, by reason: with --rotatek-keep-tokens, images that stay whole, counted
    when they are computed and not when they come from the cache. ``loads_declined``: prefixes in
    host memory that were computed again, for want of room on the device.

    A request that is retracted and admitted again counts its images again, as it compresses them
    again.
    """

    images_compressed: int = 0
    segments_compressed: int = 0
    tokens_compressed: int = 0
    compress_seconds: float = 0.0
    tokens_pruned: int = 0
    images_not_pruned: Counter = field(default_factory=Counter)
    errors: SegmentErrors = field(default_factory=SegmentErrors)
    segments_full_width: Counter = field(default_factory=Counter)
    prefixes_dropped: int = 0
    loads_declined: int = 0
    requests_stranded: int = 0
    integrity_checks: int = 0
    requests_mismatched: int = 0

    def full_width(self, reason: str, tokens: int) -> None:
        """Count an image or segment that keeps full-width Keys; logged the first time for each
        reason."""
        self._count(
            self.segments_full_width,
            reason,
            f"an image part of {tokens} tokens stays at full width",
        )

    def not_pruned(self, reason: str, tokens: int) -> None:
        """Count an image that keeps all its tokens; logged the first time for each reason."""
        self._count(self.images_not_pruned, reason, f"an image of {tokens} tokens is not pruned")

    @staticmethod
    def _count(counts: Counter, reason: str, what: str) -> None:
        if not counts[reason]:
            logger.info(
                "RotateK: %s (%s): %s. Counted from now on in /server_info.",
                what,
                reason,
                REMEDIES[reason],
            )
        counts[reason] += 1

    def mismatched_images(self, rid: str, pictures: int, runs: int) -> None:
        """Count a request whose image runs are not the host's pictures; logged the first time."""
        if not self.requests_mismatched:
            logger.warning(
                "RotateK: request %s has %d pictures and %d runs of pad ids, which do not match: "
                "images may stay at full width or share a basis; answers stay right. Please report "
                "model and SGLang version. Counted from now on in /server_info.",
                rid,
                pictures,
                runs,
            )
        self.requests_mismatched += 1
