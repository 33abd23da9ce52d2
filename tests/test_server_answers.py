"""The trained models read pictures, through a server: at full width, and with narrow Keys."""

from __future__ import annotations

import asyncio
import json
import os

import pytest
from eval_vlm import Record, evaluate_server, parse_arguments, run
from soak import rotatek_info

pytestmark = pytest.mark.server
FLAGS = ("--dtype", "float32", "--max-total-tokens", "20000")
# 48 turns: three standard errors of a rate of 0.95 are 9 points.
PICTURES = 4
# Two ranks on a machine without GPUs: a core each, and Gloo since there is no NCCL.
TWO_RANKS = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "SGLANG_NCCL_SO_PATH": "none"}


def ask(url: str, pictures: int) -> dict[tuple, Record]:
    """Three turns each about some pictures of each family, five chats at a time."""
    arguments = parse_arguments(["--url", url, "--concurrency", "5", "--pictures", str(pictures), "--turns", "3"])
    records, *_ = asyncio.run(evaluate_server(arguments))
    return {record.key: record for record in records}


def exact_match(url: str, directory) -> float:
    """Percent of right answers on the held-out pictures."""
    output = directory / "report.json"
    run(parse_arguments(["--url", url, "--concurrency", "1", "--pictures", str(PICTURES), "--turns", "4", "--output", str(output)]))
    return json.loads(output.read_text())["rates"]["family"]["all"]["exact_match_percent"]


@pytest.mark.parametrize(
    "backbone, flags, floor",
    [
        pytest.param("reader_llava_next", ("--native-llava-next",), 90, id="llava, full width"),
        pytest.param("reader_llava_next", ("--enable-rotatek",), 70, id="llava, rank 32"),
        pytest.param("reader_qwen2_5_vl", ("--enable-rotatek",), 85, id="qwen, rank 32"),
    ],
)
def test_answers_about_pictures_are_right(servers, tmp_path, backbone, flags, floor):
    url = servers.get(backbone, *FLAGS, *flags).url
    assert exact_match(url, tmp_path) >= floor
    if "--enable-rotatek" in flags:
        info = rotatek_info(url)
        assert info["images_compressed"] >= 3 * PICTURES and not info["requests_stranded"]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_tensor_parallel_2_answers_as_1_does(servers):
    # The host would split the tower, which has 5 heads.
    flags = (*FLAGS, "--enable-rotatek", "--mm-enable-dp-encoder")
    one = ask(servers.get("reader_qwen2_5_vl", *flags).url, pictures=2)
    url = servers.get("reader_qwen2_5_vl", *flags, "--tp", "2", env=TWO_RANKS).url
    assert {key: record.answer for key, record in ask(url, pictures=2).items()} == {
        key: record.answer for key, record in one.items()
    }
    assert len(one) == 18 and rotatek_info(url)["images_compressed"] == 6
