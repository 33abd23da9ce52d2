"""What the user chose, validated once and frozen."""

from __future__ import annotations

from dataclasses import dataclass

from .kernels.row_format import KEY_BITS, VALUE_BITS, RowFormat

BASES = ("pca", "paper", "think")
# Whose tokens can be pruned, and of them those whose towers visionzip reads.
ATTENTION_PRUNABLE = (
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
)
PRUNABLE = (*ATTENTION_PRUNABLE, "Qwen3VLForConditionalGeneration")
TOKEN_PRUNERS = ("divprune", "residual", "uniform", "visionzip")
RANK_MULTIPLE = 16  # and of head dims whose Keys are coded
DEFAULT_KEEP_RATIO = 0.25
DEFAULT_HEAD_CHANNELS = 16
LEAST_SEGMENT_TOKENS = 64  # fewer are hardly ever smaller with narrow Keys and a basis


class RotateKError(ValueError):
    """A configuration that RotateK cannot run. The message names thing, expected, got and
    remedy."""


@dataclass(frozen=True)
class RotateKConfig:
    """The RotateK flags.

    key_bits: 4 or 2 for coded rows, with a residual of that many bits a channel; 16 for the paper's
    rows. value_bits: of a Value channel of visual tokens; None: 4 with coded rows, 16 with the
    paper's.
    keep_ratio: of the paper's rows, share of Key channels kept; rank = keep_ratio * head_dim. None:
    0.25.
    basis: one of ``BASES``; coded rows know `pca` alone.
    head_channels: of coded rows, principal components at 8 bits. None: 16.
    max_error: of coded rows; an image with a segment whose stored Keys have a larger error
        (stats.SegmentErrors) is stored at full width from the next request on. None: never.
    keep_tokens: share of an image's tokens that stay; 1.0 prunes none. token_pruner: which, one of
    ``TOKEN_PRUNERS``.
    visual_fraction: share of the KV memory that images may hold at most, in (0, 1).
    min_image_tokens: an image with fewer tokens keeps full-width Keys; None: an image that would
        take no less memory with narrow ones does.
    segment_tokens: cut images into segments of at most this many tokens; None = one segment per
        image and prefill chunk.
    """

    keep_ratio: float | None = None
    basis: str = "pca"
    visual_fraction: float = 0.95
    min_image_tokens: int | None = None
    segment_tokens: int | None = None
    key_bits: int = 4
    value_bits: int | None = None
    head_channels: int | None = None
    max_error: float | None = None
    keep_tokens: float = 1.0
    token_pruner: str = "divprune"

    def __post_init__(self) -> None:
        self._check_choices()
        if self.is_coded:
            self._check_coded()
        else:
            self._check_paper()
        self._check_shares()
        self._check_tokens()

    def _check_choices(self) -> None:
        for flag, value, fine in (
            ("key-bits", self.key_bits, KEY_BITS),
            ("value-bits", self.value_bits, (None, *VALUE_BITS)),
        ):
            if value not in fine:
                raise RotateKError(
                    f"--rotatek-{flag} must be one of {', '.join(str(n) for n in fine if n)}, got "
                    f"{value}."
                )
        if self.basis not in BASES:
            raise RotateKError(
                f"--rotatek-basis must be one of {', '.join(BASES)}, got {self.basis!r}."
            )
        if self.token_pruner not in TOKEN_PRUNERS:
            raise RotateKError(
                f"--rotatek-token-pruner must be one of {', '.join(TOKEN_PRUNERS)}, got "
                f"{self.token_pruner!r}."
            )

    def _check_shares(self) -> None:
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise RotateKError(
                f"--rotatek-keep-ratio must be in (0, 1], got {self.keep_ratio}; 0.25 keeps 32 of "
                "128 channels."
            )
        if not 0 < self.keep_tokens <= 1:
            raise RotateKError(
                f"--rotatek-keep-tokens must be in (0, 1], got {self.keep_tokens}; 1.0, the "
                "default, keeps all."
            )
        if not 0 < self.visual_fraction < 1:
            raise RotateKError(
                "--rotatek-visual-fraction must lie between 0 and 1 (both excluded), got "
                f"{self.visual_fraction}; the default is 0.95."
            )
        if self.max_error is not None and not self.max_error > 0:
            raise RotateKError(
                f"--rotatek-max-error must be above 0, got {self.max_error}; it is a share of the "
                "Keys' energy, such as 0.01."
            )

    def _check_tokens(self) -> None:
        if self.min_image_tokens is not None and self.min_image_tokens < 1:
            raise RotateKError(
                f"--rotatek-min-image-tokens must be at least 1, got {self.min_image_tokens}."
            )
        least = self.min_image_tokens or LEAST_SEGMENT_TOKENS
        if self.segment_tokens is not None and self.segment_tokens < least:
            raise RotateKError(
                f"--rotatek-segment-tokens must be at least --rotatek-min-image-tokens ({least}), "
                f"got {self.segment_tokens}; raise the first or lower the second."
            )

    def _check_paper(self) -> None:
        for flag, setting in (
            ("head-channels", self.head_channels),
            ("max-error", self.max_error),
        ):
            if setting is not None:
                raise RotateKError(
                    f"--rotatek-{flag} {setting} is of coded Keys, but --rotatek-key-bits is "
                    "16; drop one of the two."
                )

    def _check_coded(self) -> None:
        if self.keep_ratio is not None:
            raise RotateKError(
                f"--rotatek-keep-ratio {self.keep_ratio} is of the paper's rows, but "
                f"--rotatek-key-bits is {self.key_bits}; drop it, or add --rotatek-key-bits 16."
            )
        if self.basis != "pca":
            raise RotateKError(
                f"--rotatek-basis {self.basis} is of the paper's rows, but --rotatek-key-bits is "
                f"{self.key_bits}; drop it, or add --rotatek-key-bits 16."
            )

    def check_prunable(self, architecture: str) -> None:
        """RotateKError where the model's tokens cannot be pruned and should be."""
        if self.keep_tokens < 1 and architecture not in PRUNABLE:
            raise RotateKError(
                f"--rotatek-keep-tokens {self.keep_tokens} works with {', '.join(PRUNABLE)}, got "
                f"{architecture}; drop it, or serve one of them."
            )
        if self.prunes_by_attention and architecture not in ATTENTION_PRUNABLE:
            raise RotateKError(
                f"--rotatek-token-pruner visionzip works with {', '.join(ATTENTION_PRUNABLE)}, got "
                f"{architecture}; take divprune."
            )

    @property
    def prunes_by_attention(self) -> bool:
        """Whether which tokens stay is read from the attention of the vision tower."""
        return self.keep_tokens < 1 and self.token_pruner == "visionzip"

    @property
    def is_coded(self) -> bool:
        return self.key_bits < 16

    def row_format(self, head_dim: int, v_head_dim: int) -> RowFormat:
        """What visual rows hold; raises RotateKError where the model's head dims do not allow
        it."""
        value_bits = self.value_bits or (4 if self.is_coded else 16)
        if not self.is_coded and value_bits >= 8:
            return RowFormat(self._rank(head_dim), self.key_bits, value_bits)
        if head_dim % RANK_MULTIPLE or v_head_dim % RANK_MULTIPLE:
            raise RotateKError(
                f"--rotatek-key-bits {self.key_bits} with --rotatek-value-bits {value_bits} needs "
                f"head dims that are multiples of {RANK_MULTIPLE}, got {head_dim} for Keys and "
                f"{v_head_dim} for Values; use --rotatek-key-bits 16 --rotatek-value-bits 16."
            )
        if not self.is_coded:
            return RowFormat(self._rank(head_dim), self.key_bits, value_bits)
        channels = DEFAULT_HEAD_CHANNELS if self.head_channels is None else self.head_channels
        if channels % RANK_MULTIPLE or not 0 < channels <= head_dim:
            raise RotateKError(
                f"--rotatek-head-channels must be a multiple of {RANK_MULTIPLE} up to head_dim "
                f"{head_dim}, got {channels}; the default is {DEFAULT_HEAD_CHANNELS}."
            )
        return RowFormat(channels, self.key_bits, value_bits)

    def _rank(self, head_dim: int) -> int:
        keep_ratio = DEFAULT_KEEP_RATIO if self.keep_ratio is None else self.keep_ratio
        rank = keep_ratio * head_dim
        if rank != int(rank) or int(rank) % RANK_MULTIPLE or not 0 < rank <= head_dim:
            fits = ", ".join(
                f"{r / head_dim:g}" for r in range(RANK_MULTIPLE, head_dim + 1, RANK_MULTIPLE)
            )
            raise RotateKError(
                f"--rotatek-keep-ratio {keep_ratio} times head_dim {head_dim} is {rank:g} "
                f"channels, but the rank must be a multiple of {RANK_MULTIPLE} up to head_dim; "
                f"ratios that fit this model: {fits or 'none'}."
            )
        return int(rank)
