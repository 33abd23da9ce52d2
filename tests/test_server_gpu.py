"""Servers on a GPU: kernels in CUDA graphs answer as the plain-torch path does, and lose nothing
under load."""

from __future__ import annotations

import base64
import io

import pytest
import requests
import torch
from pictures import data_url, picture
from PIL import Image
from readers import ask
from soak import POOL_FLAGS, SERVER_ENVIRONMENT, rotatek_info, soak

pytestmark = [pytest.mark.gpu, pytest.mark.server]
# Chunks cut images; of the 5 chats at a time, 3 take a padded graph and 5 none.
FLAGS = (
    *("--enable-rotatek", "--dtype", "bfloat16", "--max-total-tokens", "40000"),
    *("--chunked-prefill-size", "512", "--cuda-graph-max-bs-decode", "4"),
)
PAPER = ("--rotatek-key-bits", "16")
CODED = ("--rotatek-key-bits", "4")
CODED_FP8 = (*CODED, "--kv-cache-dtype", "fp8_e4m3")
# bfloat16 can flip a greedy near-tie, and the order of arrival decides where images are cut.
SAME_ANSWERS = 0.95
LOAD = {"pictures": 8, "concurrency": 5}
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
EXIF_ROTATED = Image.Exif()
EXIF_ROTATED[0x0112] = 6  # turned by 90 degrees


JPEG = {
    "baseline": ("RGB", {}),
    "4:4:4": ("RGB", {"subsampling": 0}),
    "progressive": ("RGB", {"progressive": True}),
    "gray": ("L", {}),
    "exif": ("RGB", {"exif": EXIF_ROTATED}),
    "cmyk": ("CMYK", {}),
}


@pytest.mark.parametrize("backbone", ["reader_qwen2_5_vl", "reader_llava_next"])
def test_every_jpeg_is_answered_and_its_image_compressed(servers, backbone):
    """The host decodes most of them on the GPU, and hands over tensors on it."""
    url = servers.get(backbone, *FLAGS).url
    for number, (mode, options) in enumerate(JPEG.values()):
        before = rotatek_info(url)["images_compressed"]
        answer = chat(url, [jpeg(number, mode, **options), jpeg(100 + number, "RGB"), png(number)])
        assert answer["usage"]["completion_tokens"] > 0
        assert rotatek_info(url)["images_compressed"] == before + 3


def jpeg(seed: int, mode: str, **options) -> str:
    file = io.BytesIO()
    picture(seed, (448, 448)).convert(mode).save(file, "JPEG", quality=90, **options)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def png(seed: int) -> str:
    return data_url(picture(seed, (448, 448)))


def chat(url: str, images: list[str]) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    body = {
        "model": "default",
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": "What is there?"}]}
        ],
        "max_tokens": 8,
    }
    response = requests.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    response.raise_for_status()
    return response.json()


@pytest.mark.parametrize(
    "rows", [PAPER, CODED, CODED_FP8], ids=["paper", "coded", "coded, text in FP8"]
)
@pytest.mark.parametrize("backbone", ["reader_qwen2_5_vl", "reader_llava_next"])
def test_kernels_in_graphs_answer_as_the_torch_path_does(servers, backbone, rows):
    server = servers.get(backbone, *FLAGS, *rows)
    ours, info = ask(server.url, **LOAD), rotatek_info(server.url)
    assert info["segments_compressed"] > info["images_compressed"] >= 24  # some were cut
    log = server.log_path.read_text()
    assert "Capture target decode CUDA graph end" in log
    of_torch = servers.get(
        backbone, *FLAGS, *rows, "--disable-cuda-graph", env={"SGLANG_ROTATEK_REFERENCE": "1"}
    )
    reference = ask(of_torch.url, **LOAD)
    if rows != PAPER:
        assert info["key_error_mean"] == pytest.approx(
            rotatek_info(of_torch.url)["key_error_mean"], rel=0.1
        )
    same = [ours[key].answer == record.answer for key, record in reference.items()]
    assert len(same) == 72 and sum(same) / len(same) >= SAME_ANSWERS


@pytest.mark.parametrize("backbone", ["qwen3_vl", "internvl3"])
def test_the_images_of_other_models_are_compressed(servers, backbone):
    url = servers.get(backbone, *FLAGS, "--rotatek-min-image-tokens", "8").url
    before = rotatek_info(url)["images_compressed"]  # the host's own picture, where it is as large
    for turn in range(2):
        assert chat(url, [jpeg(turn, "RGB"), png(turn)])["usage"]["completion_tokens"] > 0
    assert rotatek_info(url)["images_compressed"] == before + 4
    assert rotatek_info(url)["requests_mismatched"] == 0


@two_gpus
@pytest.mark.parametrize("backbone", ["reader_qwen2_5_vl", "reader_llava_next"])
def test_tensor_parallel_2_answers_as_1_does(servers, backbone):
    # The host would split the Qwen tower, which has 5 heads here.
    flags = (*FLAGS, "--mm-enable-dp-encoder") if "qwen" in backbone else FLAGS
    one = ask(servers.get(backbone, *flags).url, **LOAD)
    two = ask(servers.get(backbone, *flags, "--tp", "2").url, **LOAD)
    same = [two[key].answer == record.answer for key, record in one.items()]
    assert len(same) == 72 and sum(same) / len(same) >= SAME_ANSWERS


# The host loads the tower of LlavaLlamaForCausalLM as float16, whatever --dtype says.
@pytest.mark.parametrize(
    "backbone, rows", [("qwen2_5_vl", PAPER), ("llava_next", PAPER), ("llava_next", CODED_FP8)]
)
def test_random_chats_on_tiny_pools(servers, backbone, rows):
    # Reruns are for float32: half precision flips near-ties of models with random weights.
    flags = (*POOL_FLAGS, *rows, "--dtype", "bfloat16", "--cuda-graph-max-bs-decode", "16")
    server = servers.get(backbone, *flags, env=SERVER_ENVIRONMENT)
    assert soak(server.url, chats=200, concurrency=12, seed=11, reruns=0, max_tokens=24) == []
    assert server.is_alive()
    info = rotatek_info(server.url)
    assert info["segments_compressed"] > 200


@pytest.mark.parametrize(
    "policy, ranks",
    [("write_through", "1"), ("write_back", "1"), pytest.param("write_back", "2", marks=two_gpus)],
)
def test_random_chats_over_two_tiers(servers, policy, ranks):
    """The overlapped schedule, graphs, and transfers under both; ranks agree on what is where."""
    tier = ("--enable-hierarchical-cache", "--hicache-ratio", "2", "--hicache-write-policy", policy)
    flags = (*POOL_FLAGS, *CODED, *tier, "--dtype", "bfloat16", "--cuda-graph-max-bs-decode", "16")
    server = servers.get("qwen2_5_vl", *flags, "--tp", ranks, env=SERVER_ENVIRONMENT)
    assert soak(server.url, chats=200, concurrency=12, seed=17, reruns=0, max_tokens=24) == []
    assert server.is_alive()
    info = rotatek_info(server.url)
    assert info["host_tokens_loaded"] > 0 and info["host_load_seconds"] > 0
