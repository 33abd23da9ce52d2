"""Every way in: launch_server and sglang serve, Engine(...), the frontend language; and a start
that must fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import requests
import torch
from server_process import free_port
from soak import rotatek_info

pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[1]
SECONDS = 240
ENGINE = """
import sys
sys.path.insert(0, sys.argv[2])
from pictures import data_url, picture

if __name__ == "__main__":
    import sglang
    engine = sglang.Engine(
        model_path=sys.argv[1],
        enable_rotatek=True,
        rotatek_min_image_tokens=16,
        max_total_tokens=4096,
        log_level="warning",
    )
    prompt = "<|vision_start|><|image_pad|><|vision_end|>What is this?"
    for _ in range(2):
        reply = engine.generate(
            prompt=prompt,
            image_data=[data_url(picture(1, (336, 336)))],
            sampling_params={"temperature": 0, "max_new_tokens": 4, "ignore_eos": True},
        )
    info = engine.get_server_info()["internal_states"][0]["rotatek"]
    print("RESULT", info["visual_slots_used"], reply["meta_info"]["cached_tokens"])
    engine.shutdown()
"""


def environment() -> dict[str, str]:
    """What serve.sh sets on a machine without a GPU."""
    env = dict(os.environ)
    if not torch.cuda.is_available():
        stand_in = str(ROOT / "scripts" / "cpu_stand_in")
        env |= {
            "SGLANG_USE_CPU_ENGINE": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": stand_in,
        }
    return env


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=environment(),
    )


def test_engine_takes_the_flags_as_arguments(servers, models, tmp_path):
    servers.stop()
    script = tmp_path / "engine_chat.py"
    script.write_text(ENGINE)
    done = run(script, models["qwen2_5_vl"], ROOT / "scripts" / "common")
    assert "RESULT" in done.stdout, done.stderr[-3000:]
    visual, cached = done.stdout.split("RESULT ")[1].split()[:2]
    assert int(visual) == 144 and int(cached) >= 144


def test_help_lists_the_flags():
    text = run("-m", "sglang.launch_server", "--help").stdout
    for flag in (
        "enable-rotatek",
        "keep-ratio",
        "basis",
        "visual-fraction",
        "min-image-tokens",
        "segment-tokens",
    ):
        assert flag in text


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "sglang.launch_server", "--model-path"],
        [Path(sys.executable).with_name("sglang"), "serve"],
    ],
)
def test_a_refused_flag_ends_the_start_with_one_sentence(models, command):
    flags = ["--enable-rotatek", "--page-size", "16", "--port", str(free_port())]
    done = run(
        *command,
        models["qwen2_5_vl"],
        *flags,
        *(["--device", "cpu"] if not torch.cuda.is_available() else []),
    )
    assert done.returncode != 0
    assert (
        "--enable-rotatek does not work with --page-size 16" in done.stderr.strip().splitlines()[-1]
    )


def test_a_frontend_program_chats_over_the_rotated_image(servers):
    server = servers.get(
        "qwen2_5_vl",
        "--max-total-tokens",
        "6000",
        "--enable-rotatek",
        "--rotatek-min-image-tokens",
        "16",
    )
    done = run(ROOT / "scripts" / "eval" / "frontend_chat.py", "--base-url", server.url)
    assert done.returncode == 0, done.stderr[-2000:]
    assert rotatek_info(server.url)["tokens_compressed"] > 0


def test_the_benchmark_runs_against_a_rotatek_server(servers, tmp_path):
    server = servers.get(
        "qwen2_5_vl",
        "--max-total-tokens",
        "6000",
        "--enable-rotatek",
        "--rotatek-min-image-tokens",
        "16",
    )
    output = tmp_path / "turns.jsonl"
    done = run(
        ROOT / "scripts" / "bench" / "bench_multiturn.py",
        *(
            "--base-url",
            server.url,
            "--model",
            "m",
            "--clients",
            "3",
            "--turns",
            "2",
            "--max-tokens",
            "4",
        ),
        *("--image-size", "224x224", "--output", output),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(output.read_text().splitlines()) == 6
    assert requests.get(f"{server.url}/health", timeout=30).status_code == 200
