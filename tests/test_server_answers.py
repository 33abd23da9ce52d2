"""The trained models read pictures, through a server: at full width, and with narrow Keys."""

from __future__ import annotations

import json
import os

import pytest
import torch
from eval_vlm import parse_arguments, run
from readers import ask
from soak import rotatek_info

pytestmark = pytest.mark.server
FLAGS = ("--dtype", "float32", "--max-total-tokens", "20000")
# 48 turns: three standard errors of a rate of 0.95 are 9 points.
PICTURES = 4


def exact_match(url: str, directory) -> float:
    """Percent of right answers on the held-out pictures."""
    output = directory / "report.json"
    run(
        parse_arguments(
            [
                "--url",
                url,
                "--concurrency",
                "1",
                "--pictures",
                str(PICTURES),
                "--turns",
                "4",
                "--output",
                str(output),
            ]
        )
    )
    return json.loads(output.read_text())["rates"]["family"]["all"]["exact_match_percent"]


@pytest.mark.parametrize(
    "backbone, flags, floor",
    [
        pytest.param("reader_llava_next", ("--native-llava-next",), 90, id="llava, full width"),
        pytest.param("reader_llava_next", ("--enable-rotatek",), 90, id="llava"),
        pytest.param("reader_qwen2_5_vl", ("--enable-rotatek",), 90, id="qwen"),
    ],
)
def test_answers_about_pictures_are_right(servers, tmp_path, backbone, flags, floor):
    url = servers.get(backbone, *FLAGS, *flags).url
    assert exact_match(url, tmp_path) >= floor
    if "--enable-rotatek" in flags:
        info = rotatek_info(url)
        assert info["images_compressed"] >= 3 * PICTURES and not info["requests_stranded"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_server_gpu.py has it for GPUs")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize(
    "backbone", ["reader_qwen2_5_vl", pytest.param("reader_llava_next", marks=pytest.mark.slow)]
)
def test_two_ranks_on_the_cpu_answer_as_one_does(servers, backbone):
    flags = (*FLAGS, "--enable-rotatek")
    if "qwen" in backbone:
        flags += ("--mm-enable-dp-encoder",)  # else the host splits the tower, which has 5 heads
    one = ask(servers.get(backbone, *flags).url, pictures=2, concurrency=1)
    url = servers.get(backbone, *flags, "--tp", "2").url
    warm_up = rotatek_info(url)["images_compressed"]
    two = ask(url, pictures=2, concurrency=1)
    assert {key: record.answer for key, record in two.items()} == {
        key: record.answer for key, record in one.items()
    }
    assert len(one) == 18 and rotatek_info(url)["images_compressed"] == warm_up + 6
