"""The trained models read pictures, through a server: at full width, and with narrow Keys."""

from __future__ import annotations

import json

import pytest
from eval_vlm import parse_arguments, run
from soak import rotatek_info

pytestmark = pytest.mark.server
FLAGS = ("--dtype", "float32", "--max-total-tokens", "20000")
# 48 turns: three standard errors of a rate of 0.95 are 9 points.
PICTURES = 4


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
