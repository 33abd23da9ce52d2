"""The trained models read pictures, through a server: at full width, and with narrow Keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from eval_vlm import parse_arguments, run
from readers import ask
from soak import rotatek_info

pytestmark = pytest.mark.server
FLAGS = ("--dtype", "float32", "--max-total-tokens", "20000")
# 48 turns: three standard errors of a rate of 0.95 are 9 points.
PICTURES = 4
LMMS_VENV = Path(os.environ.get("ROTATEK_LMMS_VENV", ROOT / ".venv-lmms"))


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


def run_script(name: str, arguments: list, url: str, environment: dict) -> None:
    done = subprocess.run(
        ["bash", ROOT / "scripts" / name, *arguments],
        env=os.environ | {"ROTATEK_URL": url} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


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


@pytest.mark.skipif(
    not list(LMMS_VENV.glob("lib/python*/site-packages/lmms_eval")),
    reason=f"lmms-eval is not in {LMMS_VENV}: scripts/eval/README.md says how to install it",
)
def test_lmms_eval_finds_the_answers_right(servers, tmp_path):
    url = servers.get("reader_qwen2_5_vl", *FLAGS, "--enable-rotatek").url
    flags = ["reader_questions", "--limit", "9", "--output_path", tmp_path, "--log_samples"]
    environment = {
        "ROTATEK_LMMS_VENV": LMMS_VENV,
        "LMMS_EVAL_DATASETS_CACHE": tmp_path / "datasets",
    }
    run_script("eval/lmms.sh", flags, url, environment)
    [report] = tmp_path.rglob("*_results.json")
    assert json.loads(report.read_text())["results"]["reader_questions"]["exact_match,none"] >= 0.85
    [samples] = tmp_path.rglob("*_samples_reader_questions.jsonl")
    assert len(samples.read_text().splitlines()) == 9  # three pictures
    assert rotatek_info(url)["images_compressed"] >= 3


def test_the_hosts_benchmark_measures_our_server(servers, tmp_path):
    url = servers.get("reader_qwen2_5_vl", *FLAGS, "--enable-rotatek").url
    before, output = rotatek_info(url)["images_compressed"], tmp_path / "serving.jsonl"
    flags = "--num-prompts 3 --image-resolution 448x448 --random-output-len 8".split()
    environment = {"ROTATEK_PYTHON": sys.executable}
    run_script("bench/serving.sh", [*flags, "--output-file", output], url, environment)
    [line] = output.read_text().splitlines()
    record = json.loads(line)
    assert record["completed"] == 3 and record["mean_ttft_ms"] > 0
    assert record["total_input_vision_tokens"] >= 3 * 256
    assert rotatek_info(url)["images_compressed"] >= before + 3


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
