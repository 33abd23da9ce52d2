"""Rank 32: a server's log-probabilities equal those of a dense reference that applies the same bases outside it."""

from __future__ import annotations

import asyncio

import pytest
from chats import hold_chats, random_chat
from dense_reference import DenseChat, load_backbone
from soak import flush, rotatek_info

pytestmark = pytest.mark.server

FLAGS = (
    *("--dtype", "float32", "--max-total-tokens", "16000", "--enable-rotatek", "--rotatek-min-image-tokens", "8"),
    *("--rotatek-visual-fraction", "0.7"),
)
LOGPROB_ATOL = 1e-3  # float32 on both sides; 3e-5 was seen, and a wrong segment cut is off by 0.2
CHATS = 3


@pytest.mark.parametrize(
    "backbone, chunk_tokens",
    [
        pytest.param("qwen2_5_vl", None, id="qwen"),
        pytest.param("qwen2_5_vl", 64, id="qwen, chunks that cut images"),
        pytest.param("llava_next", None, id="llava"),  # SGLang never chunks this architecture
        pytest.param("llava_next_hf", 64, id="llava in the Hugging Face layout, chunks that cut images"),
    ],
)
def test_rank_32_equals_the_dense_reference_in_every_turn(servers, models, backbone, chunk_tokens):
    flags = (*FLAGS, *(("--chunked-prefill-size", str(chunk_tokens)) if chunk_tokens else ()))
    url = servers.get(backbone, *flags).url
    reference = load_backbone(models[backbone])
    chats = [random_chat(i, seed=3) for i in range(CHATS)]
    compared, effect = 0, 0.0
    for chat in chats:
        flush(url)
        asyncio.run(hold_chats(url, [chat], concurrency=1, max_tokens=12))
        rotated, full = (
            DenseChat(models[backbone], rank, chunk_tokens=chunk_tokens, min_image_tokens=8, backbone=reference)
            for rank in (32, 128)
        )
        for turn in chat.done:
            answer = reference.tokenizer.encode(turn.text, add_special_tokens=False)
            assert len(answer) == len(turn.logprobs), "the answer does not survive a round trip through its text"
            expected = rotated.turn(turn.messages, answer)
            assert turn.logprobs == pytest.approx(expected, abs=LOGPROB_ATOL), f"chat {chat.number} turn {turn.number}"
            exact = full.turn(turn.messages, answer)
            effect = max(effect, *(abs(a - b) for a, b in zip(expected, exact)))
            compared += 1
    assert compared >= CHATS
    assert effect > 10 * LOGPROB_ATOL, "the rank changes nothing here, so agreement shows nothing"
    assert rotatek_info(url)["segments_compressed"] > 5
