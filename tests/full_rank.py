"""What tests hold two servers to that must answer alike: stock, and RotateK with all channels
kept."""

from __future__ import annotations

import pytest
from chats import Chat

COMMON = ("--dtype", "float32", "--max-total-tokens", "8192")
EXACT = (
    *("--enable-rotatek", "--rotatek-key-bits", "16", "--rotatek-keep-ratio", "1.0"),
    *("--rotatek-min-image-tokens", "8", "--rotatek-visual-fraction", "0.7"),
)
# float32 sums in another order over 2 layers; stock differs from itself by 2e-5 between batch
# sizes.
LOGPROB_ATOL = 1e-3


def assert_same(ours: list[Chat], stock: list[Chat]) -> None:
    for our_chat, stock_chat in zip(ours, stock, strict=True):
        for our, their in zip(our_chat.done, stock_chat.done, strict=True):
            where = f"chat {our.chat} turn {our.number}"
            assert our.text == their.text, where
            assert our.prompt_tokens == their.prompt_tokens, where
            assert our.logprobs == pytest.approx(their.logprobs, abs=LOGPROB_ATOL), where
