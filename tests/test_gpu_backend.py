"""What of the GPU backend needs no GPU."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_rotatek.attention import gpu as gpu_backend
from sglang_rotatek.attention.workspace import partial_rows, workspace_bytes
from sglang_rotatek.config import RotateKError
from sglang_rotatek.kernels import compress, reference
from sglang_rotatek.kernels.partition import Partition
from sglang_rotatek.kernels.pools import LayerPools
from sglang_rotatek.kernels.row_format import RowFormat
from sglang_rotatek.memory.layout import KVShape
from sglang_rotatek.memory.prefill import PrefillLayout, Segment

REQUESTS, WIDTH, HEADS = 6, 64, 8
ROWS = RowFormat(16, 16, 16)
SHAPE = KVShape(3, num_kv_heads=2, head_dim=32, v_head_dim=16, rows=ROWS, kv_bytes=2, dtype_bytes=2)
FIRST_VISUAL = 200


def tensors_of(thing) -> list[torch.Tensor]:
    members = thing if isinstance(thing, tuple) else vars(thing).values()
    return [x for x in members if isinstance(x, torch.Tensor)]


def as_rebuilt_by_the_reference(
    partition: Partition, *arguments, prefix_lens, max_len=None
) -> None:
    _, requests, kv_lens, *_ = arguments
    assert max_len is None or max_len == kv_lens.max()
    prefixes = reference.partition(arguments[0], requests, prefix_lens, *arguments[3:])
    for i, parts, prefix in zip(
        requests.tolist(), reference.partition(*arguments), prefixes, strict=True
    ):
        text, visual, runs = parts
        partition.slots[i, : len(text)] = text
        partition.slots[i, WIDTH - len(visual) :] = visual
        partition.runs[i, : len(runs)] = runs
        partition.num_visual[i], partition.num_runs[i] = len(visual), len(runs)
        partition.prefix_visual[i] = len(prefix[1])


@pytest.fixture
def backend(monkeypatch):
    """On the CPU, without its kernels: rebuilds are the reference's, and updates of plans are
    listed."""
    backend = object.__new__(gpu_backend.RotateKGPUBackend)
    backend.updates = []
    for module in (gpu_backend.decode, gpu_backend.extend):
        monkeypatch.setattr(
            module, "update_plan", lambda *arguments: backend.updates.append(arguments)
        )
    monkeypatch.setattr(Partition, "rebuild", as_rebuilt_by_the_reference)
    monkeypatch.setattr(compress, "WORKSPACE_BYTES", 1 << 16)
    monkeypatch.setattr(compress, "SCRATCH_BYTES", 1 << 16)
    heads, dim, v_dim, rank = SHAPE.num_kv_heads, SHAPE.head_dim, SHAPE.v_head_dim, SHAPE.rows.rank
    pools = LayerPools(
        torch.zeros(FIRST_VISUAL, heads, dim), torch.zeros(FIRST_VISUAL, heads, v_dim),
        torch.zeros(100, heads, rank), torch.zeros(100, heads, v_dim), None, None,
        torch.full((100,), 7, dtype=torch.int32),
    )  # fmt: skip
    backend.token_to_kv_pool = SimpleNamespace(
        head_num=heads, head_dim=dim, v_head_dim=v_dim, layer_num=SHAPE.num_layers,
        row_dtype=torch.bfloat16,
        slot_to_basis=pools.slot_to_basis, layout=SimpleNamespace(first_visual_slot=FIRST_VISUAL),
    )  # fmt: skip
    backend.stats = SimpleNamespace(segments_compressed=0, tokens_compressed=0)
    backend.rows = ROWS
    backend.num_heads, backend.num_sms, backend.device = HEADS, 4, "cpu"
    backend.req_to_token = torch.zeros(REQUESTS, WIDTH, dtype=torch.int32)
    backend.pools, backend._prefill, backend._stale = [pools], None, ()
    backend._own_chunk = SimpleNamespace(plan=lambda *_: None)
    backend._allocate()
    return backend


def decode_batch(requests, lens):
    return SimpleNamespace(
        seq_lens=torch.tensor(lens),
        req_pool_indices=torch.tensor(requests),
        forward_mode=ForwardMode.DECODE,
    )


def extend_batch(requests, prefix_lens, extend_lens, out_cache_loc):
    lens = [p + n for p, n in zip(prefix_lens, extend_lens, strict=True)]
    return SimpleNamespace(
        seq_lens=torch.tensor(lens), req_pool_indices=torch.tensor(requests),
        forward_mode=ForwardMode.EXTEND,
        extend_seq_lens=torch.tensor(extend_lens, dtype=torch.int32),
        extend_seq_lens_cpu=extend_lens,
        extend_prefix_lens=torch.tensor(prefix_lens, dtype=torch.int32),
        extend_prefix_lens_cpu=prefix_lens,
        out_cache_loc=out_cache_loc,
    )  # fmt: skip


def test_graphs_and_larger_steps_share_one_plan_that_fits_every_batch(backend):
    backend.init_cuda_graph_state(REQUESTS, REQUESTS)
    assert backend._decode.plan.max_requests == REQUESTS
    backend.init_cuda_graph_state(REQUESTS + 2, REQUESTS + 2)  # the host rounds batch sizes up
    assert backend._decode.plan.max_requests == REQUESTS + 2
    for num_requests in (2, REQUESTS, 1):
        requests = list(range(num_requests))
        for init in (backend.init_forward_metadata_out_graph, backend.init_forward_metadata):
            init(decode_batch(requests, [1] * num_requests))
            plan, indices, lens, req_to_token = backend.updates.pop()
            assert plan is backend.forward_metadata.plan is backend._decode.plan
            assert (
                req_to_token is backend.req_to_token and len(indices) == len(lens) == num_requests
            )
            assert len(backend.forward_metadata.q_indptr) > num_requests


def test_a_prefill_binds_its_slots_and_is_in_the_partition_before_it_is_planned(backend):
    request = 3
    row = torch.cat(
        [
            torch.arange(5, 15),
            torch.arange(FIRST_VISUAL + 10, FIRST_VISUAL + 30),
            torch.arange(40, 44),
        ]
    )
    backend.req_to_token[request, : len(row)] = row.int()
    slots = np.arange(FIRST_VISUAL + 18, FIRST_VISUAL + 30)
    backend.expect(PrefillLayout(16, [Segment(0, slots, 2, (0, 16))]))
    backend.init_forward_metadata(extend_batch([request], [18], [16], row[18:]))
    partition = backend.partition
    assert partition.num_visual[request] == 20 and partition.prefix_visual[request] == 8
    assert partition.runs[request, :2].tolist() == [[8, 7], [20, 2]]
    ((plan, _, lens),) = backend.updates
    assert plan.attended_visual is partition.prefix_visual and lens.tolist() == [18]
    assert backend.forward_metadata.images.keys.shape[1:] == (
        12,
        SHAPE.num_kv_heads,
        SHAPE.head_dim,
    )
    assert backend.forward_metadata.images.keys.data_ptr() == backend.compressor.keys.data_ptr()


def test_loaded_slots_are_bound_before_the_partition_asks_for_their_bases(backend):
    row = torch.cat([torch.arange(FIRST_VISUAL + 10, FIRST_VISUAL + 30), torch.arange(40, 44)])
    backend.req_to_token[3, : len(row)] = row.int()
    loaded = [
        (np.arange(FIRST_VISUAL + 10, FIRST_VISUAL + 16), 4),
        (np.arange(FIRST_VISUAL + 16, FIRST_VISUAL + 30), 5),
    ]
    backend.expect(PrefillLayout(4, loaded=loaded))
    backend.init_forward_metadata(extend_batch([3], [20], [4], row[20:]))
    assert backend.partition.runs[3, :2].tolist() == [[6, 4], [20, 5]]
    assert backend.forward_metadata.images is None


def test_a_layer_begins_when_what_was_loaded_of_it_is_there(backend, monkeypatch):
    calls = []
    backend.token_to_kv_pool.start_layer = 4
    backend.token_to_kv_pool.layer_transfer_counter = SimpleNamespace(
        wait_until=lambda layer: calls.append(layer)
    )
    monkeypatch.setattr(AttentionBackend, "forward", lambda *_, **__: calls.append("forward"))
    backend.forward(None, None, None, SimpleNamespace(layer_id=6), None)
    assert calls == [2, "forward"]


def test_a_short_text_prefill_reads_its_own_tokens_from_the_partition(backend):
    backend.req_to_token[2, :6] = torch.arange(1, 7)
    backend.init_forward_metadata(extend_batch([2], [0], [6], torch.arange(1, 7)))
    ((_, _, lens),) = backend.updates
    assert backend.forward_metadata.is_stored and lens.tolist() == [6]
    assert backend.partition.slots[2, :6].tolist() == list(range(1, 7))


def test_a_prefill_of_many_tokens_behind_a_prefix_expands_it(backend, monkeypatch):
    monkeypatch.setattr(gpu_backend.expand, "FROM_TOKENS", 10)
    planned = []
    backend._own_chunk = SimpleNamespace(plan=lambda *arguments: planned.append(arguments))
    for request in (1, 2):
        backend.req_to_token[request, :40] = torch.arange(40) + 40 * request
    slots = torch.cat([torch.arange(70, 80), torch.arange(105, 120)])
    backend.init_forward_metadata(extend_batch([1, 2], [30, 25], [10, 15], slots))
    metadata = backend.forward_metadata
    assert metadata.plan is None and not metadata.is_stored and not backend.updates
    expansion = metadata.expansion
    assert expansion.kv_indptr.tolist() == [0, 40, 80] and expansion.max_len == 40
    assert expansion.prefix_lens.tolist() == [30, 25] and expansion.prefix_lens.dtype == torch.int32
    assert expansion.keys.shape == (80, SHAPE.num_kv_heads, SHAPE.head_dim)
    ((queries, keys, *_),) = planned
    assert (queries.lens, keys.lens) == ([10, 15], [40, 40]) and keys.indptr is expansion.kv_indptr
    # Too few new tokens, or too many for the workspace.
    backend.init_forward_metadata(extend_batch([1], [30], [9], torch.arange(70, 79)))
    assert backend.forward_metadata.expansion is None and backend.forward_metadata.is_stored
    backend.expanded_keys = backend.expanded_keys[:79]
    backend.init_forward_metadata(extend_batch([1, 2], [30, 25], [10, 15], slots))
    assert backend.forward_metadata.expansion is None


def test_stale_requests_are_rebuilt_once_before_a_decode_step(backend):
    first = torch.arange(FIRST_VISUAL, FIRST_VISUAL + 20)
    for request in (1, 2, 4):
        backend.req_to_token[request, :30] = torch.cat(
            [torch.arange(10) + 10 * request, first + 20 * (request // 2)]
        ).int()
    backend.expect(None, [4, 2])
    backend.init_forward_metadata_out_graph(decode_batch([1, 2, 4, 0, 0], [30, 28, 30, 1, 1]))
    assert backend.partition.num_visual.tolist() == [0, 0, 18, 0, 20, 0]
    assert backend.partition.slots[4, :10].tolist() == list(range(40, 50))
    backend.partition.num_visual.zero_()
    backend.init_forward_metadata_out_graph(decode_batch([1, 2, 4], [30, 28, 30]))
    assert not backend.partition.num_visual.any() and len(backend.updates) == 2
    backend.expect(None, [4])
    backend.init_forward_metadata(extend_batch([1], [0], [6], torch.arange(1, 7)))
    assert not len(backend._stale)


@pytest.mark.parametrize("max_extend_tokens", [100, 5000])
def test_the_backend_allocates_no_more_than_it_tells_the_budget(backend, max_extend_tokens):
    size = workspace_bytes(
        SHAPE,
        num_requests=REQUESTS,
        width=WIDTH,
        num_heads=HEADS,
        max_extend_tokens=max_extend_tokens,
        num_sms=4,
    )
    group = HEADS // SHAPE.num_kv_heads
    extend_plan = backend.extend_plan([max_extend_tokens - REQUESTS + 1] + [1] * (REQUESTS - 1))
    small_plan = backend.extend_plan([1])
    assert len(extend_plan.items) >= max_extend_tokens * group // 64 and small_plan.splits
    plan = backend._decode.plan
    at_start = (
        tensors_of(backend.partition)
        + tensors_of(backend._partials)
        + [
            backend.compressor.keys,
            backend.compressor.scratch,
            backend.expanded_keys,
            backend.expanded_values,
        ]
    )
    at_start += [
        plan.num_splits,
        plan.partial_start,
        plan.num_tiles,
        plan.items,
        plan.num_items,
        backend._decode.q_indptr,
    ]
    in_a_prefill = [
        extend_plan.num_splits,
        extend_plan.partial_start,
        extend_plan.num_tiles,
        extend_plan.items,
    ]
    keys = backend.compressor.key_workspace(1, max_extend_tokens)
    more_keys = max(0, keys.nbytes - backend.compressor.keys.nbytes)
    taken = sum(x.nbytes for x in at_start + in_a_prefill) + more_keys
    assert len(backend._partials.lse) == partial_rows(HEADS, SHAPE.num_kv_heads, False, 4)
    # What is not taken: splits of a plan for so many tokens, and its start offsets.
    assert taken <= size <= taken + (1 << 16)


@pytest.mark.parametrize(
    ("rows", "kv_dtype", "flag"),
    [
        (RowFormat(16, 4, 4), torch.float8_e4m3fn, "--kv-cache-dtype fp8_e4m3"),
        (RowFormat(16, 4, 8), torch.bfloat16, "--rotatek-value-bits 8"),
    ],
)
def test_fp8_is_refused_on_a_gpu_without_it(rows, kv_dtype, flag):
    with pytest.raises(
        RotateKError, match=f"with {flag} needs a GPU of compute capability 8.9 .* found 8.0"
    ):
        gpu_backend.check_fp8(rows, kv_dtype, (8, 0))
    gpu_backend.check_fp8(rows, kv_dtype, (9, 0))
    gpu_backend.check_fp8(RowFormat(16, 4, 4), torch.bfloat16, (8, 0))
