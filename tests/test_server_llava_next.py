"""LLaVA-NeXT in the Hugging Face layout, native: a server's log-probabilities equal those of
Transformers."""

from __future__ import annotations

import asyncio

import openai
import pytest
from chats import complete, connect, hold_chats, image_part, random_chat
from dense_reference import DenseChat, load_backbone

from sglang_rotatek.kernels.row_format import RowFormat

pytestmark = pytest.mark.server
FULL_RANK = RowFormat(128, 16, 16)
FLAGS = (
    "--dtype",
    "float32",
    "--max-total-tokens",
    "16000",
    "--chunked-prefill-size",
    "64",
    "--native-llava-next",
)


def test_a_video_is_refused_with_the_reason(servers):
    url = servers.get("llava_next_hf", *FLAGS).url
    video = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}

    async def ask() -> None:
        async with connect(url) as client:
            content = [image_part(1, (112, 112)), video, {"type": "text", "text": "What moves?"}]
            await complete(client, [{"role": "user", "content": content}], max_tokens=4)

    with pytest.raises(
        openai.BadRequestError, match="takes text and pictures, got video: leave it out"
    ):
        asyncio.run(ask())


@pytest.mark.parametrize(
    "backbone", ["llava_next_hf", "llava_next_hf_mistral", "llava_next_hf_qwen2"]
)
def test_native_server_equals_transformers_with_0_to_3_images_and_chunks_that_cut_them(
    servers, models, backbone
):
    url = servers.get(backbone, *FLAGS).url
    reference = load_backbone(models[backbone])
    chats = [random_chat(i, seed=5) for i in range(6)]
    asyncio.run(hold_chats(url, chats, concurrency=4, max_tokens=8))
    cached_tokens = 0
    for chat in chats:
        dense = DenseChat(models[backbone], FULL_RANK, backbone=reference)
        for turn in chat.done:
            answer = reference.tokenizer.encode(turn.text, add_special_tokens=False)
            expected = dense.turn(turn.messages, answer)
            assert turn.logprobs == pytest.approx(expected, abs=1e-3), (
                f"chat {chat.number} turn {turn.number}"
            )
            cached_tokens += turn.cached_tokens if turn.number else 0
    images = [
        part
        for chat in chats
        for parts in chat.turns
        for part in parts
        if part["type"] == "image_url"
    ]
    assert len(images) > len(chats), "chats with several images are what this test is for"
    assert cached_tokens > 0, "the radix cache is off"
