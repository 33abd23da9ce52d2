"""A server's log-probabilities equal those of a dense reference that stores the same rows outside
it."""

from __future__ import annotations

import asyncio

import pytest
import server_plugin
from chats import hold_chats, random_chat
from dense_reference import DenseChat, load_backbone
from server_plugin import Dumped
from soak import flush, rotatek_info

from sglang_rotatek.kernels.row_format import RowFormat

pytestmark = pytest.mark.server

FLAGS = (
    *(
        "--dtype",
        "float32",
        "--max-total-tokens",
        "16000",
        "--enable-rotatek",
        "--rotatek-min-image-tokens",
        "8",
    ),
    *("--rotatek-visual-fraction", "0.7"),
)
LOGPROB_ATOL = 1e-3  # float32 on both sides; 3e-5 was seen, and a wrong segment cut is off by 0.2
CHATS = 3


PAPER = (RowFormat(32, 16, 16), ("--rotatek-key-bits", "16"))
CODED = (RowFormat(16, 4, 4), ("--rotatek-key-bits", "4"))
FP8_TEXT = ("--kv-cache-dtype", "fp8_e4m3")
CHUNKS = ("--chunked-prefill-size", "64")  # that cut images


@pytest.mark.parametrize(
    "backbone, rows, row_flags, flags",
    [
        pytest.param("qwen2_5_vl", *PAPER, CHUNKS, id="qwen, chunks"),
        pytest.param("qwen2_5_vl", *CODED, (), id="qwen, coded"),
        pytest.param("qwen2_5_vl", *CODED, (*CHUNKS, *FP8_TEXT), id="qwen, coded, FP8, chunks"),
        pytest.param("llava_next", *PAPER, (), id="llava"),  # SGLang never chunks this architecture
        pytest.param(
            "llava_next_hf", *CODED, CHUNKS, id="llava in the Hugging Face layout, coded, chunks"
        ),
    ],
)
def test_a_server_equals_the_dense_reference_in_every_turn(
    servers, models, tmp_path, backbone, rows, row_flags, flags
):
    chunk_tokens = 64 if CHUNKS[0] in flags else None
    flags = (*FLAGS, *row_flags, *flags)
    environment = (
        server_plugin.environment(tmp_path / "site", tmp_path / "dump")
        if rows.has_residual
        else None
    )
    url = servers.get(backbone, *flags, env=environment).url
    dumped = Dumped(tmp_path / "dump") if environment else None
    reference = load_backbone(models[backbone])
    chats = [random_chat(i, seed=3) for i in range(CHATS)]
    compared, effect = 0, 0.0
    for chat in chats:
        flush(url)
        asyncio.run(hold_chats(url, [chat], concurrency=1, max_tokens=12))
        rotated, full = (
            DenseChat(
                models[backbone],
                of,
                chunk_tokens=chunk_tokens,
                min_image_tokens=8,
                backbone=reference,
                fp8_text=of is rows and "fp8_e4m3" in flags,
                dumped=dumped if of is rows else None,
            )
            for of in (rows, RowFormat(128, 16, 16))
        )
        for turn in chat.done:
            answer = reference.tokenizer.encode(turn.text, add_special_tokens=False)
            assert len(answer) == len(turn.logprobs), (
                "the answer does not survive a round trip through its text"
            )
            expected = rotated.turn(turn.messages, answer)
            assert turn.logprobs == pytest.approx(expected, abs=LOGPROB_ATOL), (
                f"chat {chat.number} turn {turn.number}"
            )
            compared += 1
            if chat is chats[0]:
                exact = full.turn(turn.messages, answer)
                effect = max(effect, *(abs(a - b) for a, b in zip(expected, exact, strict=True)))
    assert compared >= CHATS and (dumped is None or dumped.is_read())
    assert effect > 10 * LOGPROB_ATOL, "the rows change nothing here, so agreement shows nothing"
    assert rotatek_info(url)["segments_compressed"] > 5
