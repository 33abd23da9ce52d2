"""Models beyond those of test_server_exact.py: full rank equals stock, with pictures cut by chunks;
videos."""

from __future__ import annotations

import asyncio
import base64
import io
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from chats import Chat, complete, connect, hold_chats, image_part, random_chat
from full_rank import COMMON, EXACT, LOGPROB_ATOL, assert_same
from pictures import picture
from soak import rotatek_info, wait_for_check

pytestmark = pytest.mark.server

# 64 cuts every picture of the chats; InternVL's and LLaVA's template alone is longer.
FLAGS = (*COMMON, "--chunked-prefill-size", "64")
CHATS = 12
FRAMES, MILLISECONDS = 12, 500  # the host takes two frames a second, all of them, in groups of two
# A stand-in of the video decoder, where FFmpeg is not installed.
STAND_IN = Path(__file__).with_name("decoder_stand_in")
DECODER = {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(STAND_IN), os.environ.get("PYTHONPATH")]))
}


@dataclass(frozen=True)
class Model:
    """``image_tokens``: of pictures of 336 x 336 and 168 x 224 px in one prompt. ``video_pieces``:
    bases of the video."""

    backbone: str
    image_tokens: tuple[int, int]
    video_pieces: int = 0


MODELS = (
    Model("qwen3_vl", (100, 35), video_pieces=6),  # text between the frame groups
    Model("internvl3", (160, 208)),
    # Two frame groups of 144 tokens a piece, which together have enough for a basis.
    pytest.param(Model("qwen2_5_vl", (144, 48), video_pieces=3), marks=pytest.mark.slow),
    pytest.param(Model("qwen2_vl", (144, 48), video_pieces=3), marks=pytest.mark.slow),
    pytest.param(Model("llava_onevision", (100, 100)), marks=pytest.mark.slow),
)
COUNTERS = ("images_compressed", "segments_compressed", "tokens_compressed")


@dataclass
class Session:
    """What one server answered; and on RotateK, by how much its counters rose for two pictures and
    for a video."""

    chats: list[Chat]
    pictures: dict
    video: dict | None
    of_pictures: Counter
    of_video: Counter


def animation() -> str:
    """A video whose frames are pictures, as a data URL."""
    # Equal ones would become one.
    first, *rest = [picture(f"frame {i}", (112, 112)) for i in range(FRAMES)]
    buffer = io.BytesIO()
    first.save(buffer, "PNG", save_all=True, append_images=rest, duration=MILLISECONDS)
    return "data:video/mp4;base64," + base64.b64encode(buffer.getvalue()).decode()


def ask(url: str, *parts: dict) -> dict:
    async def run() -> dict:
        async with connect(url) as client:
            content = [*parts, {"type": "text", "text": "What is in it?"}]
            return await complete(client, [{"role": "user", "content": content}], max_tokens=16)

    return asyncio.run(run())


def counters(url: str, is_ours: bool) -> Counter:
    return Counter({name: rotatek_info(url)[name] for name in COUNTERS} if is_ours else {})


def ask_everything(servers, model: Model, *flags: str) -> Session:
    is_ours = bool(flags)
    url = servers.get(model.backbone, *FLAGS, *flags, preload_env=DECODER).url
    start = counters(url, is_ours)
    pictures = ask(
        url, image_part(1, (336, 336), "multi-images"), image_part(2, (168, 224), "multi-images")
    )
    after_pictures = counters(url, is_ours)
    video = (
        ask(url, {"type": "video_url", "video_url": {"url": animation()}})
        if model.video_pieces
        else None
    )
    after_video = counters(url, is_ours)
    chats = [random_chat(i, seed=11) for i in range(CHATS)]
    asyncio.run(hold_chats(url, chats, concurrency=6, max_tokens=16))
    if is_ours:
        info = wait_for_check(url)
        assert (info["text_slots_used"], info["visual_slots_used"], info["bases_used"]) == (0, 0, 0)
        assert not info["requests_mismatched"], (
            "the host marks pictures in a way that image_runs does not know"
        )
    return Session(chats, pictures, video, after_pictures - start, after_video - after_pictures)


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: model.backbone)
def model(request) -> Model:
    return request.param


@pytest.fixture(scope="module")
def stock(servers, model) -> Session:
    return ask_everything(servers, model)


@pytest.fixture(scope="module")
def ours(servers, model, stock) -> Session:
    return ask_everything(servers, model, *EXACT)


def assert_same_reply(ours: dict, stock: dict) -> None:
    (our,), (their,) = ours["choices"], stock["choices"]
    assert our["message"]["content"] == their["message"]["content"]
    assert ours["usage"]["prompt_tokens"] == stock["usage"]["prompt_tokens"]
    logprobs = [
        [token["logprob"] for token in choice["logprobs"]["content"]] for choice in (our, their)
    ]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=LOGPROB_ATOL)


def test_every_turn_of_chats_with_0_to_3_pictures_equals_stock(ours, stock):
    assert sum(chat.done[-1].cached_tokens > 0 for chat in ours.chats) > CHATS // 2
    assert_same(ours.chats, stock.chats)


def test_two_pictures_are_compressed_whole_and_answered_as_by_stock(ours, stock, model):
    assert_same_reply(ours.pictures, stock.pictures)
    assert ours.of_pictures["images_compressed"] == 2
    assert ours.of_pictures["segments_compressed"] > 2, "no chunk cut a picture"
    assert ours.of_pictures["tokens_compressed"] == sum(model.image_tokens)


def test_a_video_is_compressed_by_frame_groups_and_answered_as_by_stock(ours, stock, model):
    if not model.video_pieces:
        pytest.skip(f"{model.backbone} is not tested with videos")
    assert_same_reply(ours.video, stock.video)
    assert ours.of_video["images_compressed"] == model.video_pieces
    tokens, prompt = ours.of_video["tokens_compressed"], stock.video["usage"]["prompt_tokens"]
    assert tokens % (FRAMES // 2) == 0 and 0.75 * prompt < tokens < prompt
