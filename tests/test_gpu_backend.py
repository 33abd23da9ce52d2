"""What of the GPU backend needs no GPU."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_rotatek.attention import gpu as gpu_backend


def test_graphs_keep_their_plan_after_a_decode_step_that_is_too_large_for_them(monkeypatch):
    updated = []
    monkeypatch.setattr(gpu_backend.decode, "make_plan", lambda max_requests, *_: SimpleNamespace(max_requests=max_requests))
    monkeypatch.setattr(gpu_backend.decode, "update_plan", lambda plan, *_: updated.append(plan))
    backend = object.__new__(gpu_backend.RotateKGPUBackend)
    backend.max_context_len, backend.num_heads, backend.num_sms, backend.device = 8, 1, 1, "cpu"
    backend.req_to_token, backend._pools, backend._plan, backend._eager_decode = None, [None], None, None

    def step(num_requests, replay):
        lens = torch.ones(num_requests)
        batch = SimpleNamespace(seq_lens=lens, req_pool_indices=lens, forward_mode=ForwardMode.DECODE)
        (backend.init_forward_metadata_out_graph if replay else backend.init_forward_metadata)(batch)
        assert updated.pop() is backend.forward_metadata.plan
        assert len(backend.forward_metadata.q_indptr) > num_requests
        return backend.forward_metadata

    backend.init_cuda_graph_state(2, 2)
    captured = step(2, replay=True)
    eager = step(3, replay=False)
    assert step(1, replay=True) is captured is not eager
    assert step(4, replay=False) is eager  # not a new plan at every new height
    assert step(5, replay=False).plan.max_requests == 8
    assert step(2, replay=True) is captured
