"""Servers on a GPU: kernels in CUDA graphs answer as the plain-torch path does, and lose nothing under load."""

from __future__ import annotations

import pytest
import torch
from readers import ask
from soak import SERVER_ENVIRONMENT, SERVER_FLAGS, rotatek_info, soak

pytestmark = [pytest.mark.gpu, pytest.mark.server]
# Chunks cut images; of the 5 chats at a time, 3 take a padded graph and 5 none.
FLAGS = (
    *("--enable-rotatek", "--dtype", "bfloat16", "--max-total-tokens", "40000"),
    *("--chunked-prefill-size", "512", "--cuda-graph-max-bs", "4"),
)
# bfloat16 can flip a greedy near-tie, and the order of arrival decides where images are cut.
SAME_ANSWERS = 0.95
LOAD = {"pictures": 8, "concurrency": 5}


@pytest.mark.parametrize("backbone", ["reader_qwen2_5_vl", "reader_llava_next"])
def test_kernels_in_graphs_answer_as_the_torch_path_does(servers, backbone):
    server = servers.get(backbone, *FLAGS)
    ours, info = ask(server.url, **LOAD), rotatek_info(server.url)
    assert info["segments_compressed"] > info["images_compressed"] >= 24  # some were cut
    log = server.log_path.read_text()
    assert "Capture target decode CUDA graph end" in log
    reference = ask(servers.get(backbone, *FLAGS, "--disable-cuda-graph", env={"SGLANG_ROTATEK_REFERENCE": "1"}).url, **LOAD)
    same = [ours[key].answer == record.answer for key, record in reference.items()]
    assert len(same) == 72 and sum(same) / len(same) >= SAME_ANSWERS


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("backbone", ["reader_qwen2_5_vl", "reader_llava_next"])
def test_tensor_parallel_2_answers_as_1_does(servers, backbone):
    # The host would split the Qwen tower, which has 5 heads here.
    flags = (*FLAGS, "--mm-enable-dp-encoder") if "qwen" in backbone else FLAGS
    one = ask(servers.get(backbone, *flags).url, **LOAD)
    two = ask(servers.get(backbone, *flags, "--tp", "2").url, **LOAD)
    same = [two[key].answer == record.answer for key, record in one.items()]
    assert len(same) == 72 and sum(same) / len(same) >= SAME_ANSWERS


# The host's tower of LlavaLlamaForCausalLM is float16, whatever --dtype says.
@pytest.mark.parametrize(("backbone", "dtype"), [("qwen2_5_vl", "bfloat16"), ("llava_next", "float16")])
def test_random_chats_on_tiny_pools(servers, backbone, dtype):
    # Reruns are for float32: half precision flips near-ties of models with random weights.
    flags = (*SERVER_FLAGS, "--rotatek-keep-ratio", "0.25", "--dtype", dtype, "--cuda-graph-max-bs", "16")
    server = servers.get(backbone, *flags, env=SERVER_ENVIRONMENT)
    assert soak(server.url, chats=200, concurrency=12, seed=11, reruns=0, max_tokens=24) == []
    assert server.is_alive()
    info = rotatek_info(server.url)
    assert info["segments_compressed"] > 200
