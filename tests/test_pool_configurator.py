"""The KV budget: tokens that fit, after what attention takes beside the pool."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sglang_rotatek.attention import workspace
from sglang_rotatek.attention.workspace import workspace_bytes
from sglang_rotatek.config import RotateKConfig
from sglang_rotatek.kernels.row_format import RowFormat
from sglang_rotatek.memory.layout import KVShape, layout_of_bytes, layout_of_total
from sglang_rotatek.patches import pool_configurator

pytestmark = pytest.mark.usefixtures("host_configuration")
SHAPE = KVShape(
    28, 4, head_dim=128, v_head_dim=128, rows=RowFormat(32, 16, 16), kv_bytes=2, dtype_bytes=2
)
BUDGET = 40 << 30
REQUESTS, CONTEXT, EXTRA = 2048, 32768, 4


def configurator(device: str, monkeypatch):
    """Of a model of SHAPE, without the host's own sizes."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132)
    )
    monkeypatch.setattr(pool_configurator.own_chunk, "workspace_bytes", lambda _: 1 << 27)
    monkeypatch.setattr(pool_configurator, "get_req_to_token_extra_context_len", lambda: EXTRA)
    monkeypatch.setattr(
        pool_configurator, "get_schedule", lambda: SimpleNamespace(chunked_prefill_size=8192)
    )
    monkeypatch.setattr(pool_configurator, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1))
    made = object.__new__(pool_configurator.RotateKPoolConfigurator)
    made._kvc = SimpleNamespace(
        device=device,
        model_config=SimpleNamespace(context_len=CONTEXT, num_attention_heads=28),
        resolve_max_num_reqs=lambda tokens: REQUESTS,
    )
    made._config, made._shape, made._available_bytes = RotateKConfig(), SHAPE, None
    return made


def test_what_attention_takes_on_a_gpu_is_not_given_to_the_pool(monkeypatch):
    on_cpu = configurator("cpu", monkeypatch).calculate_pool_sizes(BUDGET, 1).max_total_num_tokens
    on_gpu = configurator("cuda", monkeypatch).calculate_pool_sizes(BUDGET, 1).max_total_num_tokens
    assert on_cpu == layout_of_bytes(BUDGET, RotateKConfig(), SHAPE).total_slots
    bytes_of = [
        layout_of_total(tokens, RotateKConfig(), SHAPE).bytes(SHAPE) for tokens in (on_cpu, on_gpu)
    ]
    taken = workspace_bytes(
        SHAPE,
        num_requests=REQUESTS + 1,
        width=CONTEXT + EXTRA,
        num_heads=28,
        max_extend_tokens=8192,
    )
    assert abs(bytes_of[0] - bytes_of[1] - taken - (1 << 27)) <= 2 * SHAPE.slab_bytes
    # The sorted slots of all requests are most of it, beside prefixes at full width.
    assert 4 * REQUESTS * CONTEXT < taken - workspace.EXPANDED_BYTES < 2 * 4 * REQUESTS * CONTEXT


def test_a_token_limit_is_held_against_what_is_left(monkeypatch):
    made = configurator("cuda", monkeypatch)
    most = made.calculate_pool_sizes(BUDGET, 1).max_total_num_tokens
    assert made.calculate_pool_sizes_from_max_tokens(1 << 30, 1).max_total_num_tokens == most
    few = made.calculate_pool_sizes_from_max_tokens(1000, 1).max_total_num_tokens
    assert few == layout_of_bytes(1000 * SHAPE.text_row_bytes, RotateKConfig(), SHAPE).total_slots
