"""Phases of text and of image chats on a tiny memory: nothing crashes, hangs, leaks, or answers
otherwise than cold."""

from __future__ import annotations

import pytest
from soak import SERVER_ENVIRONMENT, SERVER_FLAGS, rotatek_info, soak

pytestmark = pytest.mark.server


@pytest.mark.parametrize("backbone", ["qwen2_5_vl", "llava_next"])
def test_random_chats_on_tiny_pools(servers, backbone):
    server = servers.get(backbone, *SERVER_FLAGS, env=SERVER_ENVIRONMENT)
    problems = soak(server.url, chats=200, concurrency=12, seed=11, reruns=40, max_tokens=24)
    assert problems == []
    assert server.is_alive()
    assert rotatek_info(server.url)["segments_compressed"] > 100
