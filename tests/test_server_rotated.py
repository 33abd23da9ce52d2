"""Servers with the paper's rows and with coded ones: reuse, sharing, refusals of bad input,
capacity, metrics."""

from __future__ import annotations

import asyncio
import base64
import io

import pytest
import requests
import server_plugin
from chats import complete, connect, image_part
from pictures import picture
from soak import rotatek_info, wait_for_check

pytestmark = pytest.mark.server

FLAGS = (
    *(
        "--dtype",
        "float32",
        "--max-total-tokens",
        "6000",
        "--enable-rotatek",
        "--rotatek-min-image-tokens",
        "16",
    ),
    *("--rotatek-visual-fraction", "0.7", "--enable-metrics", "--chunked-prefill-size", "2048"),
)
CODED = ("--rotatek-key-bits", "4", "--kv-cache-dtype", "fp8_e4m3")
SERVERS = {
    "qwen, the paper's rows": ("qwen2_5_vl", "--rotatek-key-bits", "16"),
    "llava, coded rows and text in FP8": ("llava_next", *CODED),
}
SIZE = (336, 336)


# Module scope makes pytest run all tests of one backbone together, on one server.
@pytest.fixture(scope="module", params=SERVERS)
def server(servers, request, tmp_path_factory):
    environment = server_plugin.environment(tmp_path_factory.mktemp("site"))
    return servers.get(*SERVERS[request.param], *FLAGS, env=environment)


@pytest.fixture
def url(server) -> str:
    wait_for_check(server.url)  # flushed, so each test begins with empty pools
    return server.url


def ask(url: str, messages: list[dict], max_tokens: int = 8) -> dict:
    async def run() -> dict:
        async with connect(url) as client:
            return await complete(client, messages, max_tokens)

    return asyncio.run(run())


def user(*parts: dict | str) -> dict:
    return {
        "role": "user",
        "content": [p if isinstance(p, dict) else {"type": "text", "text": p} for p in parts],
    }


def assistant(reply: dict) -> dict:
    return {"role": "assistant", "content": reply["choices"][0]["message"]["content"]}


def cached(reply: dict) -> int:
    return (reply["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0)


def assert_nothing_is_lost(url: str) -> None:
    info = wait_for_check(url)
    assert (info["text_slots_used"], info["visual_slots_used"], info["bases_used"]) == (0, 0, 0)


def test_second_turn_reuses_the_rotated_image(url):
    first = user(image_part(1, SIZE), "What is it?")
    reply = ask(url, [first])
    visual = rotatek_info(url)["visual_slots_used"]
    assert visual >= 100
    compressed = rotatek_info(url)["tokens_compressed"]
    again = ask(url, [first, assistant(reply), user("And its colour?")])
    assert cached(again) >= reply["usage"]["prompt_tokens"] - 1
    assert rotatek_info(url)["tokens_compressed"] == compressed
    assert_nothing_is_lost(url)


def test_two_chats_with_one_image_share_its_slots(url):
    ask(url, [user(image_part(2, SIZE), "What is it?")])
    one = rotatek_info(url)
    reply = ask(url, [user(image_part(2, SIZE), "Which word is in it?")])
    two = rotatek_info(url)
    assert (two["visual_slots_used"], two["bases_used"]) == (
        one["visual_slots_used"],
        one["bases_used"],
    )
    assert cached(reply) >= one["visual_slots_used"]
    assert_nothing_is_lost(url)


def test_image_only_and_image_free_prompts_are_answered(url):
    assert ask(url, [user(image_part(3, SIZE))])["usage"]["completion_tokens"] == 8
    before = rotatek_info(url)["tokens_compressed"]
    assert ask(url, [user("Why is the sky blue?")])["usage"]["completion_tokens"] == 8
    assert rotatek_info(url)["tokens_compressed"] == before
    assert_nothing_is_lost(url)


def test_prometheus_shows_the_pools(url):
    ask(url, [user(image_part(4, SIZE), "What is it?")])
    values = {
        line.split("{")[0]: float(line.rsplit(" ", 1)[1])
        for line in requests.get(f"{url}/metrics", timeout=30).text.splitlines()
        if line.startswith("sglang:rotatek")
    }
    info = rotatek_info(url)
    assert values["sglang:rotatek_visual_slots_total"] == info["visual_slots_total"]
    assert values["sglang:rotatek_slabs_total"] == info["slabs_total"]
    assert (values["sglang:rotatek_rank"], values["sglang:rotatek_key_bits"]) in ((32, 16), (16, 4))
    assert values["sglang:rotatek_key_error_count"] == info["segments_measured"] > 0
    assert values["sglang:rotatek_key_error_sum"] == pytest.approx(
        info["segments_measured"] * info["key_error_mean"]
    )
    assert 0 < info["key_error_mean"] <= info["key_error_max"] < 1
    # Four bits of the residual leave less than a fiftieth of it; the paper's rows drop it.
    share = info["key_error_mean"] / info["residual_energy_mean"]
    assert share < 0.02 if info["key_bits"] == 4 else share == pytest.approx(1, rel=1e-3)


def raw_image(data: bytes) -> dict:
    return {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()},
    }


def png(seed: int, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    picture(seed, size).save(buffer, "PNG")
    return buffer.getvalue()


def status_of(url: str, messages: list[dict]) -> tuple[int, str]:
    body = {"model": "m", "messages": messages, "max_tokens": 4, "temperature": 0}
    response = requests.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    return response.status_code, response.text


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(user(raw_image(png(1, SIZE)[:200]), "?"), id="truncated image"),
        pytest.param(user(raw_image(b"not an image at all"), "?"), id="text instead of an image"),
        # Qwen takes 16 tokens for each, LLaVA (which pools beyond 16 images) about 25.
        pytest.param(
            user(*[image_part(6, (112, 112), "multi-images")] * 600, "?"), id="too many images"
        ),
        pytest.param(user("word " * 6000), id="text longer than the memory"),
    ],
)
def test_bad_input_gets_an_error_and_the_server_goes_on(url, message):
    status, text = status_of(url, [message])
    assert 400 <= status < 600 and len(text) > 20, text
    assert_still_answers(url)


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(user(raw_image(png(1, (1, 1))), "?"), id="1x1 image"),
        pytest.param(user(raw_image(png(1, (20000, 10))), "?"), id="20000x10 image"),
        pytest.param(
            user("<|vision_start|><|image_pad|><|image_pad|><|vision_end|> <image> <image>"),
            id="image tokens as text",
        ),
    ],
)
def test_odd_input_is_answered_or_refused_and_the_server_goes_on(url, message):
    status, text = status_of(url, [message])
    assert status == 200 or (400 <= status < 600 and len(text) > 20), text
    assert_still_answers(url)


def assert_still_answers(url: str) -> None:
    assert ask(url, [user(image_part(5, SIZE), "What is it?")])["usage"]["completion_tokens"] == 8
    assert_nothing_is_lost(url)


def test_text_that_only_image_tokens_would_fit_is_refused_by_name(url):
    info = rotatek_info(url)
    words = info["text_slots_total"] + 50
    status, text = status_of(url, [user("cat " * words)])
    assert status == 400
    assert (
        "KV memory" in text
        and str(info["text_slots_total"]) in text
        and "Shorten the prompt" in text
    )
    assert_still_answers(url)


def test_text_takes_the_memory_of_cached_images_and_images_take_it_back(url):
    total = rotatek_info(url)["text_slots_total"]

    def show_pictures() -> dict:
        """Ten pictures, which take more than half of the memory."""
        for seed in range(100, 110):
            ask(url, [user(image_part(seed, (672, 672)), "?")], max_tokens=1)
        return rotatek_info(url)

    with_images = show_pictures()
    assert with_images["slabs_of_images"] > with_images["slabs_total"] // 2
    ask(url, [user("cat " * (total * 3 // 4))], max_tokens=1)
    with_text = rotatek_info(url)
    assert with_text["slabs_of_text"] > with_text["slabs_total"] // 2
    again = show_pictures()
    assert again["visual_slots_used"] == with_images["visual_slots_used"]
    assert not again["segments_full_width"].get("no_room_for_images")
    assert_nothing_is_lost(url)


def chats_still_cached(url: str, chats: int) -> int:
    """Hold ``chats`` chats of one 576-token image each, then return to them, latest first: how many
    in a row hit."""
    first = [
        user(image_part(seed, (672, 672)), "What is in this picture?") for seed in range(chats)
    ]
    replies = [ask(url, [message], max_tokens=1) for message in first]
    for hits, (message, reply) in enumerate(reversed(list(zip(first, replies, strict=True)))):
        if cached(ask(url, [message, assistant(reply), user("?")], max_tokens=1)) < 576:
            return hits
    return chats


TOKENS = 9 * 640  # stock keeps 9 chats


@pytest.fixture(scope="module")
def chats_of_stock(servers) -> int:
    flags = ("--dtype", "bfloat16", "--max-total-tokens", str(TOKENS))
    return chats_still_cached(servers.get("qwen2_5_vl", *flags).url, 12)


@pytest.mark.parametrize(
    ("key_bits", "chats", "more_tokens", "more_chats"),
    # Whole chats only: 13 where 13.5 would fit in fractions.
    [
        pytest.param("16", 16, 1.48, 1.4, id="the paper's rows"),
        pytest.param("4", 27, 3.1, 2.6, id="coded rows"),
    ],
)
def test_an_image_heavy_server_keeps_so_many_times_the_chats_of_stock_in_the_same_bytes(
    chats_of_stock, servers, key_bits, chats, more_tokens, more_chats
):
    flags = (
        "--dtype",
        "bfloat16",
        "--max-total-tokens",
        str(TOKENS),
        "--rotatek-key-bits",
        key_bits,
    )
    url = servers.get("qwen2_5_vl", *flags, "--enable-rotatek").url
    ours = chats_still_cached(url, chats)
    info = rotatek_info(url)
    assert info["stock_tokens"] <= TOKENS
    assert info["visual_slots_total"] >= more_tokens * info["stock_tokens"]
    assert chats_of_stock <= 9
    assert ours >= more_chats * chats_of_stock, (ours, chats_of_stock)
