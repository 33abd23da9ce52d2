"""The GPU backend, all of its launches, beside the plain-torch one: a prefill with an image, later
turns behind it, and decode. By Triton's interpreter alone (test_kernels.py says how):
test_server_gpu.py compares the two on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from test_kernels import INTERPRETED

from sglang_rotatek.attention import backend as torch_backend
from sglang_rotatek.attention import gpu as gpu_backend
from sglang_rotatek.config import RotateKConfig
from sglang_rotatek.memory.allocator import RotateKAllocator
from sglang_rotatek.memory.layout import KVShape, layout_of_slabs
from sglang_rotatek.memory.pool import RotateKKVPool
from sglang_rotatek.memory.prefill import PrefillLayout, Segment

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 in the environment"),
    pytest.mark.usefixtures("host_configuration"),
]
LAYERS, HEADS, KV_HEADS, DIM = 2, 4, 2, 64
DTYPE = torch.float32
CONTEXT, NUM_SLABS, REQUEST, FIRST_LAYER = 512, 40, 1, 3
CONFIGS = {
    "coded": RotateKConfig(),
    "paper's rows, pca": RotateKConfig(key_bits=16),
    "paper's rows, paper": RotateKConfig(key_bits=16, basis="paper"),
    "paper's rows, think": RotateKConfig(key_bits=16, basis="think"),
}


class Event:
    """Of a GPU that has done everything by the time it is asked."""

    def __init__(self, **_) -> None:
        pass

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, _) -> float:
        return 1.0


class OwnChunk:
    """kernels/own_chunk.py's, in plain torch."""

    def plan(self, q, kv, heads, dtype) -> None:
        self._q, self._kv = q, kv

    def run(self, q, k, v, sm_scale, logit_cap):
        outs, lses, at, first = [], [], 0, 0
        for n, m in zip(self._q.lens, self._kv.lens, strict=True):
            keys, values = (
                x[first : first + m].repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v)
            )
            scores = torch.einsum("qhd,khd->hqk", q[at : at + n], keys) * sm_scale
            seen = torch.arange(m)[None, :] <= torch.arange(m - n, m)[:, None]
            scores = scores.masked_fill(~seen, float("-inf"))
            outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
            lses.append(scores.logsumexp(-1).T)
            at, first = at + n, first + m
        return torch.cat(outs), torch.cat(lses).contiguous()


def make_backend(kind, config):
    shape = KVShape(
        LAYERS, KV_HEADS, DIM, DIM, config.row_format(DIM, DIM), DTYPE.itemsize, DTYPE.itemsize
    )
    layout = layout_of_slabs(NUM_SLABS, config, shape)
    pool = RotateKKVPool(
        layout, shape, DTYPE, page_size=1, dtype=DTYPE, head_num=KV_HEADS, head_dim=DIM,
        v_head_dim=DIM, layer_num=LAYERS, device="cpu", enable_memory_saver=False,
        start_layer=FIRST_LAYER, end_layer=FIRST_LAYER + LAYERS - 1,
    )  # fmt: skip
    runner = SimpleNamespace(
        device="cpu",
        req_to_token_pool=ReqToTokenPool(4, CONTEXT, "cpu", enable_memory_saver=False),
        token_to_kv_pool=pool,
        token_to_kv_pool_allocator=RotateKAllocator(layout, config, DTYPE, "cpu", pool),
        model=None,
        model_config=SimpleNamespace(num_attention_heads=HEADS),
    )
    return kind(runner)


@pytest.fixture
def backends(request, monkeypatch):
    """(ours for a GPU, the plain-torch one) of ``request.param``, a configuration."""
    parallel = SimpleNamespace(attn_tp_size=1)
    for module in (torch_backend, gpu_backend):
        monkeypatch.setattr(module, "get_parallel", lambda: parallel)
    monkeypatch.setattr(gpu_backend, "own_chunk_attention", lambda device: OwnChunk())
    properties = SimpleNamespace(multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options)
    )
    return tuple(
        make_backend(kind, request.param)
        for kind in (gpu_backend.RotateKGPUBackend, torch_backend.RotateKTorchBackend)
    )


class Chat:
    """One request whose image has 150 tokens, and what of it each backend computes."""

    def __init__(self, backends) -> None:
        self.backends, self.length = backends, 0
        layout = backends[0].token_to_kv_pool.layout
        self.text = iter(range(layout.text_rows, 20 * layout.text_rows))
        first = layout.first_visual_slot + 20 * layout.visual_rows
        self.image = np.arange(first, first + 150)
        draws = torch.Generator().manual_seed(0)
        # Keys of as many directions as all formats keep and hardly anything else, about a mean.
        self.directions = torch.randn(LAYERS, KV_HEADS, 16, DIM, generator=draws)
        self.draws = draws

    def step(self, slots, segments=(), mode=ForwardMode.EXTEND):
        """Outputs [layers][n, Hq * D] of both for the next tokens of the request, in ``slots``."""
        n, prefix = len(slots), self.length
        self.length += n
        inputs = [self.inputs(layer, n) for layer in range(LAYERS)]
        outputs = []
        for backend in self.backends:
            table = backend.req_to_token
            table[REQUEST, prefix : self.length] = torch.as_tensor(slots, dtype=torch.int32)
            batch = self.batch(slots, prefix, mode)
            prefill = PrefillLayout(n, list(segments)) if mode == ForwardMode.EXTEND else None
            backend.expect(prefill)
            backend.init_forward_metadata(batch)
            forward = (
                backend.forward_extend if mode == ForwardMode.EXTEND else backend.forward_decode
            )
            outputs.append([forward(*x, self.layer(i), batch) for i, x in enumerate(inputs)])
        return outputs

    def inputs(self, layer, n):
        def normal(*size):
            return torch.randn(*size, generator=self.draws)

        coordinates = normal(n, KV_HEADS, 16) * torch.logspace(0, -1, 16)
        keys = torch.einsum("nhr,hrd->nhd", coordinates, self.directions[layer])
        keys += 1e-3 * normal(n, KV_HEADS, DIM) + 1
        q, v = normal(n, HEADS, DIM), normal(n, KV_HEADS, DIM)
        return [x.flatten(1) for x in (q, keys, v)]

    def batch(self, slots, prefix, mode):
        def ints(*numbers, dtype=torch.int64):
            return torch.tensor(numbers, dtype=dtype)

        return SimpleNamespace(
            forward_mode=mode,
            out_cache_loc=torch.as_tensor(slots, dtype=torch.int64),
            req_pool_indices=ints(REQUEST),
            seq_lens=ints(self.length),
            extend_seq_lens=ints(len(slots), dtype=torch.int32),
            extend_seq_lens_cpu=[len(slots)],
            extend_prefix_lens=ints(prefix, dtype=torch.int32),
            extend_prefix_lens_cpu=[prefix],
        )

    @staticmethod
    def layer(index):
        return SimpleNamespace(
            layer_id=FIRST_LAYER + index, tp_q_head_num=HEADS, tp_k_head_num=KV_HEADS,
            tp_v_head_num=KV_HEADS, qk_head_dim=DIM, v_head_dim=DIM, scaling=DIM**-0.5,
            logit_cap=0.0, k_scale=None,
        )  # fmt: skip


def assert_alike(outputs, bound):
    for ours, expected in zip(*outputs, strict=True):
        error = (ours - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert error.max() < bound


@pytest.mark.parametrize("backends", CONFIGS.values(), ids=CONFIGS, indirect=True)
def test_all_steps_of_a_chat_are_as_in_plain_torch(backends):
    is_coded = backends[0].rows.is_coded
    bound = 1e-2 if is_coded else 1e-4  # codes may round apart
    chat = Chat(backends)
    text = [next(chat.text) for _ in range(60)]
    prompt = np.concatenate([text[:7], chat.image, text[7:12]])
    assert_alike(chat.step(prompt, [Segment(7, chat.image, 30, (130, 162))]), bound)
    assert_alike(chat.step(text[12:13], mode=ForwardMode.DECODE), bound)
    # A short question reads its own tokens from the pool, a long one coded rows at full width.
    assert_alike(chat.step(text[13:18]), bound)
    assert (backends[0].forward_metadata.is_stored, chat.length) == (True, 168)
    assert_alike(chat.step(text[18:58]), bound)
    assert (backends[0].forward_metadata.expansion is not None) == is_coded
    assert_alike(chat.step(text[58:59], mode=ForwardMode.DECODE), bound)
    backends[0].allocator.settle_errors()
    ours, expected = (backend.stats for backend in backends)
    assert ours.segments_compressed == expected.segments_compressed == 1
    if backends[0].rows.has_residual:
        errors, expected_errors = ours.errors.summary(), expected.errors.summary()
        assert errors == pytest.approx(expected_errors, rel=0.1, abs=1e-5)
