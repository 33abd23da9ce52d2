"""What the user chose, validated once and frozen."""

from __future__ import annotations

from dataclasses import dataclass

BASES = ("pca", "paper", "think")
RANK_MULTIPLE = 16
LEAST_SEGMENT_TOKENS = 64  # fewer are hardly ever smaller with narrow Keys and a basis


class RotateKError(ValueError):
    """A configuration that RotateK cannot run. The message names thing, expected, got and remedy."""


@dataclass(frozen=True)
class RotateKConfig:
    """The RotateK flags.

    keep_ratio: share of Key channels kept for visual tokens; rank = keep_ratio * head_dim.
    basis: one of ``BASES``.
    visual_fraction: share of the KV memory that images may hold at most, in (0, 1).
    min_image_tokens: an image with fewer tokens keeps full-width Keys; None: an image that would take no less memory
        with narrow ones does.
    segment_tokens: cut images into segments of at most this many tokens; None = one segment per image
        and prefill chunk.
    """

    keep_ratio: float = 0.25
    basis: str = "pca"
    visual_fraction: float = 0.95
    min_image_tokens: int | None = None
    segment_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.keep_ratio <= 1:
            raise RotateKError(
                f"--rotatek-keep-ratio must be in (0, 1], got {self.keep_ratio}; 0.25 keeps 32 of 128 channels."
            )
        if self.basis not in BASES:
            raise RotateKError(f"--rotatek-basis must be one of {', '.join(BASES)}, got {self.basis!r}.")
        if not 0 < self.visual_fraction < 1:
            raise RotateKError(
                f"--rotatek-visual-fraction must lie between 0 and 1 (both excluded), got {self.visual_fraction}; "
                "the default is 0.95."
            )
        if self.min_image_tokens is not None and self.min_image_tokens < 1:
            raise RotateKError(f"--rotatek-min-image-tokens must be at least 1, got {self.min_image_tokens}.")
        least = self.min_image_tokens or LEAST_SEGMENT_TOKENS
        if self.segment_tokens is not None and self.segment_tokens < least:
            raise RotateKError(
                f"--rotatek-segment-tokens must be at least --rotatek-min-image-tokens ({least}), "
                f"got {self.segment_tokens}; raise the first or lower the second."
            )

    def rank(self, head_dim: int) -> int:
        """Kept Key channels for ``head_dim``; raises RotateKError unless a multiple of 16 within head_dim."""
        rank = self.keep_ratio * head_dim
        if rank != int(rank) or int(rank) % RANK_MULTIPLE or not 0 < rank <= head_dim:
            fits = ", ".join(f"{r / head_dim:g}" for r in range(RANK_MULTIPLE, head_dim + 1, RANK_MULTIPLE))
            raise RotateKError(
                f"--rotatek-keep-ratio {self.keep_ratio} times head_dim {head_dim} is {rank:g} channels, but the rank "
                f"must be a multiple of {RANK_MULTIPLE} up to head_dim; ratios that fit this model: {fits or 'none'}."
            )
        return int(rank)
