"""Servers with --enable-hierarchical-cache: an image that left the device is not computed again,
and answers stay the same."""

from __future__ import annotations

import os

import pytest
import requests
import torch
from chats import image_part
from soak import SERVER_ENVIRONMENT, SERVER_FLAGS, rotatek_info, soak, wait_for_check

pytestmark = pytest.mark.server

FLAGS = (
    *(
        "--enable-rotatek",
        "--dtype",
        "bfloat16" if torch.cuda.is_available() else "float32",
        "--max-total-tokens",
        "1500",
        "--chunked-prefill-size",
        "512",
    ),
    *("--enable-hierarchical-cache", "--hicache-ratio", "8", "--enable-metrics"),
)
SERVERS = {
    "qwen, coded rows": ("qwen2_5_vl", "--hicache-write-policy", "write_through"),
    "llava, the paper's rows": (
        "llava_next",
        "--rotatek-key-bits",
        "16",
        "--hicache-write-policy",
        "write_back",
    ),
}
SIZE = (336, 336)
two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


@pytest.fixture(scope="module", params=SERVERS)
def url(servers, request) -> str:
    return servers.get(*SERVERS[request.param], *FLAGS, env=SERVER_ENVIRONMENT).url


def ask(url: str, messages: list[dict], max_tokens: int = 16) -> tuple[str, list[float], int, dict]:
    """Text, log-probabilities, prompt tokens and where the cached ones were."""
    body = {
        "model": "m", "messages": messages, "max_tokens": max_tokens, "temperature": 0,
        "ignore_eos": True, "logprobs": True, "return_cached_tokens_details": True,
    }  # fmt: skip
    response = requests.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    response.raise_for_status()
    reply = response.json()
    (choice,) = reply["choices"]
    logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
    details = (reply.get("sglext") or {}).get("cached_tokens_details") or {}
    return choice["message"]["content"], logprobs, reply["usage"]["prompt_tokens"], details


def user(*parts: dict | str) -> dict:
    return {
        "role": "user",
        "content": [p if isinstance(p, dict) else {"type": "text", "text": p} for p in parts],
    }


def hold(url: str, seed: int, between) -> tuple[list, dict]:
    """Two turns about a picture, with ``between()`` between them."""
    messages = [user(image_part(seed, SIZE), "What is in the picture?")]
    first = ask(url, messages)
    messages += [{"role": "assistant", "content": first[0]}, user("Which word is largest?")]
    between()
    text, logprobs, _, details = ask(url, messages)
    return [first[:3], text, logprobs], details


def test_an_image_that_left_the_device_comes_back_and_nothing_of_it_is_computed_again(url):
    wait_for_check(url)
    here, on_device = hold(url, 1, lambda: None)
    wait_for_check(url)
    before = {}

    def fill_the_device() -> None:
        tokens, number = 0, 0
        while tokens < 2 * before.get("text_slots_total", 1):
            number += 1
            tokens += ask(url, [user(f"{number}. " + "Why is the sky blue? " * 20)], max_tokens=1)[
                2
            ]
            before.update(rotatek_info(url))

    back, from_host = hold(url, 1, fill_the_device)
    after = rotatek_info(url)
    assert on_device["host"] == 0 < on_device["device"]
    assert (
        from_host["host"] > 100 and from_host["device"] + from_host["host"] == on_device["device"]
    )
    assert after["host_tokens_loaded"] - before["host_tokens_loaded"] == from_host["host"]
    assert after["tokens_compressed"] == before["tokens_compressed"]
    assert after["host_loaded_bytes"] > before["host_loaded_bytes"]
    assert back[:2] == here[:2]
    assert back[2] == pytest.approx(here[2], abs=1e-4)
    info = wait_for_check(url)
    assert (info["host_slabs_used"], info["slabs_free"]) == (0, info["slabs_total"])


def test_prometheus_shows_the_hosts_memory(url):
    ask(url, [user(image_part(7, SIZE), "Why?")], max_tokens=1)
    values = {
        line.split("{")[0]: float(line.rsplit(" ", 1)[1])
        for line in requests.get(f"{url}/metrics", timeout=30).text.splitlines()
        if line.startswith("sglang:")
    }
    info = rotatek_info(url)
    assert (
        values["sglang:rotatek_host_slabs_total"]
        == info["host_slabs_total"]
        >= 7 * info["slabs_total"]
    )
    assert values["sglang:hicache_host_total_tokens"] >= 7 * info["text_slots_total"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_server_gpu.py does this in bfloat16")
@pytest.mark.parametrize(
    "policy, ranks",
    [
        ("write_through", "1"),
        pytest.param("write_back", "2", marks=two_cores),
        pytest.param("write_back", "1", marks=pytest.mark.slow),
    ],
)
def test_random_chats_on_tiny_memories(servers, policy, ranks):
    """Two ranks take the same decisions, or one waits for the other for ever."""
    flags = ("--enable-hierarchical-cache", "--hicache-ratio", "2", "--tp", ranks)
    flags += ("--hicache-write-policy", policy)
    server = servers.get("qwen2_5_vl", *SERVER_FLAGS, *flags, env=SERVER_ENVIRONMENT)
    problems = soak(server.url, chats=100, concurrency=12, seed=13, reruns=30, max_tokens=24)
    assert problems == []
    assert server.is_alive()
    assert rotatek_info(server.url)["host_tokens_loaded"] > 0
