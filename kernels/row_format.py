"""What a visual row holds, and its bytes."""

from __future__ import annotations

from dataclasses import dataclass

KEY_BITS = (16, 4, 2)
VALUE_BITS = (16, 8, 4, 2)
STEP_BYTES = 4  # of codes of a token and head: step and zero point of either half of the channels


@dataclass(frozen=True)
class RowFormat:
    """Of each KV head: ``rank`` coordinates of the Key in its segment's basis (z), and the Value.

    key_bits 16: z in the model's dtype and nothing else, the paper's rows. 4 or 2: z in 8 bits
    (``rank`` is the A of coded.py), and a residual of that many bits a channel. value_bits 16: the
    model's dtype; 8: FP8 (e4m3); 4 or 2: codes. Codes of 4 and 2 bits have STEP_BYTES beside them.
    """

    rank: int = 16
    key_bits: int = 4
    value_bits: int = 4

    def __post_init__(self) -> None:
        for name, value, fine in (
            ("key_bits", self.key_bits, KEY_BITS),
            ("value_bits", self.value_bits, VALUE_BITS),
        ):
            if value not in fine:
                raise ValueError(f"{name} must be one of {', '.join(map(str, fine))}, got {value}")
        if self.rank < 4 or self.rank % 4:
            raise ValueError(
                f"rank must be a multiple of 4, got {self.rank}: rows are aligned to 4 bytes"
            )

    @property
    def has_residual(self) -> bool:
        return self.key_bits < 16

    @property
    def is_coded(self) -> bool:
        return self.key_bits < 16 or self.value_bits < 16

    @property
    def has_value_codes(self) -> bool:
        return self.value_bits < 8

    @property
    def steps_bytes(self) -> int:
        """Of a token and head: those of the Key's residual, then of the Value."""
        return STEP_BYTES * (self.has_residual + self.has_value_codes)

    def z_bytes(self, itemsize: int) -> int:
        return self.rank * (1 if self.has_residual else itemsize)

    def residual_bytes(self, head_dim: int) -> int:
        return head_dim * self.key_bits // 8 if self.has_residual else 0

    def code_bytes(self, v_head_dim: int, itemsize: int) -> int:
        """Of the Value, its steps left out."""
        return v_head_dim * itemsize if self.value_bits == 16 else v_head_dim * self.value_bits // 8

    def row_bytes(self, head_dim: int, v_head_dim: int, itemsize: int = 2) -> int:
        """Of one token and KV head, where the model's dtype takes ``itemsize`` bytes."""
        parts = (
            self.z_bytes(itemsize),
            self.residual_bytes(head_dim),
            self.code_bytes(v_head_dim, itemsize),
        )
        return sum(parts) + self.steps_bytes
