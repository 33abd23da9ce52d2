"""With all channels kept, a RotateK server must answer as the stock server does, token for
token."""

from __future__ import annotations

import asyncio

import pytest
import requests
from chats import Chat, hold_chats, random_chat
from full_rank import COMMON, EXACT, LOGPROB_ATOL, assert_same
from pictures import data_url, picture
from soak import flush, rotatek_info, wait_for_check

pytestmark = pytest.mark.server

CHATS = 16
RECORDED: dict[tuple, list[Chat]] = {}


def record(servers, backbone: str, *flags: str, concurrency: int, env=None) -> list[Chat]:
    """The same random chats with 0-3 images each, held with one server; recorded once per
    configuration."""
    key = (backbone, flags, concurrency, str(env))
    if key not in RECORDED:
        server = servers.get(backbone, *flags, env=env)
        chats = [random_chat(i, seed=7) for i in range(CHATS)]
        asyncio.run(hold_chats(server.url, chats, concurrency=concurrency, max_tokens=16))
        RECORDED[key] = chats
    return RECORDED[key]


@pytest.mark.parametrize("chunk", ["64", "4096"])
def test_qwen_at_full_rank_equals_stock_in_every_turn(servers, chunk):
    flags = (*COMMON, "--chunked-prefill-size", chunk)
    stock = record(servers, "qwen2_5_vl", *COMMON, concurrency=8)
    assert_same(record(servers, "qwen2_5_vl", *flags, *EXACT, concurrency=8), stock)
    assert_used_and_clean(servers.get("qwen2_5_vl", *flags, *EXACT).url)


@pytest.mark.parametrize("start", [0, 20, 120])
def test_at_full_rank_log_probabilities_that_start_inside_a_cached_image_equal_a_cold_run(
    servers, start
):
    url = servers.get("qwen2_5_vl", *COMMON, "--chunked-prefill-size", "4096", *EXACT).url
    text = "<|vision_start|><|image_pad|><|vision_end|>What is it?"
    prompt = {"text": text, "image_data": data_url(picture(1, (336, 336)))}
    sampling = {"sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}}

    def input_logprobs() -> list[float]:
        reply = post(url, {"return_logprob": True, "logprob_start_len": start} | prompt | sampling)
        # The first has none.
        return [each[0] for each in reply["meta_info"]["input_token_logprobs"][1:]]

    flush(url)
    cold = input_logprobs()
    flush(url)
    prompt_tokens = post(url, prompt | sampling)["meta_info"]["prompt_tokens"]
    assert input_logprobs() == pytest.approx(cold, abs=LOGPROB_ATOL)
    assert len(cold) == prompt_tokens - start - 1
    wait_for_check(url)


def post(url: str, body: dict) -> dict:
    response = requests.post(f"{url}/generate", json=body, timeout=60)
    response.raise_for_status()
    return response.json()


def test_llava_at_full_rank_equals_stock_in_every_turn(servers):
    stock = record(servers, "llava_next", *COMMON, concurrency=8)
    assert_same(record(servers, "llava_next", *COMMON, *EXACT, concurrency=8), stock)
    assert_used_and_clean(servers.get("llava_next", *COMMON, *EXACT).url)


def test_without_the_flag_the_plugin_changes_nothing(servers):
    without_plugin = {"SGLANG_PLUGINS": "none"}
    stock = record(servers, "qwen2_5_vl", *COMMON, concurrency=1, env=without_plugin)
    memory_without = memory_lines(servers.get("qwen2_5_vl", *COMMON, env=without_plugin))
    inert = record(servers, "qwen2_5_vl", *COMMON, concurrency=1)
    for ours, theirs in zip(inert, stock, strict=True):
        assert [turn.text for turn in ours.done] == [turn.text for turn in theirs.done]
        assert [turn.logprobs for turn in ours.done] == [turn.logprobs for turn in theirs.done]
    assert memory_lines(servers.get("qwen2_5_vl", *COMMON)) == memory_without


def memory_lines(server) -> list[str]:
    """What the server logs of its KV cache, without time stamps and the machine's free memory."""
    wanted = ("KV Cache is allocated", "max_total_num_tokens=", "Tree cache initialized")
    lines = server.log_path.read_text().splitlines()
    return [
        line.split("] ", 1)[1].split("available_cpu_mem")[0]
        for line in lines
        if any(w in line for w in wanted)
    ]


def assert_used_and_clean(url: str) -> None:
    assert rotatek_info(url)["tokens_compressed"] > 500
    info = wait_for_check(url)
    assert info["images_compressed"] > 0 and not info["requests_mismatched"]
    assert (info["text_slots_used"], info["visual_slots_used"], info["bases_used"]) == (0, 0, 0)
