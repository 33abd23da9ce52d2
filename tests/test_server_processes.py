"""A server of several processes: data-parallel ranks, HTTP workers, and both. (Tensor parallelism:
test_server_answers.py.)"""

from __future__ import annotations

import asyncio
import os
import re

import pytest
import requests
import torch
from chats import complete, connect, image_part
from readers import ask

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a rank needs a core of its own"),
    pytest.mark.skipif(0 < torch.cuda.device_count() < 2, reason="a rank needs a GPU of its own"),
]
FLAGS = ("--enable-rotatek", "--dtype", "float32", "--max-total-tokens", "8000", "--enable-metrics")
DP = ("--dp-size", "2")
HTTP_WORKERS = ("--tokenizer-worker-num", "2")


def states(url: str) -> list[dict]:
    """What each data-parallel rank says of RotateK."""
    info = requests.get(f"{url}/server_info", timeout=30).json()
    return [state["rotatek"] for state in info["internal_states"]]


def gauge(url: str, name: str) -> dict[str | None, float]:
    """A gauge by the label dp_rank."""
    lines = [
        line
        for line in requests.get(f"{url}/metrics", timeout=30).text.splitlines()
        if line.startswith(f"sglang:rotatek_{name}{{")
    ]
    ranks = [re.search(r'dp_rank="(\d+)"', line) for line in lines]
    return {
        rank and rank[1]: float(line.rsplit(" ", 1)[1])
        for rank, line in zip(ranks, lines, strict=True)
    }


async def cached_tokens(url: str, rank: int) -> int:
    """Of a prompt with a picture, sent to one data-parallel rank."""
    messages = [
        {
            "role": "user",
            "content": [image_part(77, (336, 336)), {"type": "text", "text": "What is it?"}],
        }
    ]
    async with connect(url) as client:
        reply = await complete(client, messages, 1, {"X-Data-Parallel-Rank": str(rank)})
    return (reply["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0)


@pytest.mark.parametrize(
    "backbone, flags",
    [
        pytest.param(
            "reader_llava_next", (*DP, *HTTP_WORKERS), id="llava, dp 2 and two HTTP workers"
        ),
        pytest.param(
            "reader_qwen2_5_vl",
            (*DP, *HTTP_WORKERS),
            id="qwen, dp 2 and two HTTP workers",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "reader_llava_next", HTTP_WORKERS, id="llava, two HTTP workers", marks=pytest.mark.slow
        ),
    ],
)
def test_every_process_knows_rotatek(servers, backbone, flags):
    server = servers.get(backbone, *FLAGS, *flags, preload=False)
    before = states(server.url)
    answers = ask(server.url, pictures=1, concurrency=3)
    right = sum(record.is_right for record in answers.values())
    assert len(answers) == 9 and right >= 8, right
    after = states(server.url)
    assert len(after) == (2 if "--dp-size" in flags else 1)
    compressed = [
        new["images_compressed"] - old["images_compressed"]
        for old, new in zip(before, after, strict=True)
    ]
    assert all(compressed) and sum(compressed) >= 3, compressed
    ranks = ("0", "1") if "--dp-size" in flags else (None,)
    assert gauge(server.url, "visual_slots_total") == dict.fromkeys(
        ranks, after[0]["visual_slots_total"]
    )
    if "--dp-size" in flags:
        first, again, other = (asyncio.run(cached_tokens(server.url, rank)) for rank in (1, 1, 0))
        assert again > 100 > max(first, other)


def test_all_tensor_parallel_ranks_store_an_inexact_image_at_full_width_from_the_next_request_on(
    servers,
):
    flags = ("--tp", "2", "--rotatek-max-error", "1e-9", "--rotatek-min-image-tokens", "8")
    url = servers.get("qwen2_5_vl", *FLAGS, *flags).url
    prompt = [
        {
            "role": "user",
            "content": [image_part(78, (336, 336)), {"type": "text", "text": "What is it?"}],
        }
    ]
    before = states(url)[0]
    usages = [asyncio.run(one_reply(url, prompt))["usage"] for _ in range(3)]
    details = [usage["prompt_tokens_details"] or {} for usage in usages]
    cached = [each.get("cached_tokens", 0) for each in details]
    after = states(url)[0]
    assert after["images_compressed"] == before["images_compressed"] + 1
    assert after["segments_full_width"].get("narrow_keys_were_too_inexact") == 1
    assert cached[1] < 100 < cached[2], "the narrow copy is not reused, the exact one is"
    assert after["visual_slots_used"] == before["visual_slots_used"]


async def one_reply(url: str, messages: list[dict]) -> dict:
    async with connect(url) as client:
        return await complete(client, messages, 8)
