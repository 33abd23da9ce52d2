"""Every Triton kernel against its plain-torch reference.

With CUDA compiled, in bf16: pytest -m gpu tests/test_kernels.py. Without, by Triton's interpreter,
in fp32 and fp16: TRITON_INTERPRET=1 pytest tests/test_kernels.py, in a process of its own, since
Triton reads that variable at import.
"""

import os
import random
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from test_reference import PREFIXES, TEXT

from sglang_rotatek.basis import paper
from sglang_rotatek.kernels import attend, compress, decode, expand, extend, partition, reference
from sglang_rotatek.kernels.partition import Partition
from sglang_rotatek.kernels.plan import Plan
from sglang_rotatek.kernels.pools import CompressedPools, LayerPools
from sglang_rotatek.kernels.store import store

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
pytestmark = pytest.mark.gpu
if DEVICE == "cpu":
    reason = (
        "needs an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment to interpret the kernels"
    )
    pytestmark = pytest.mark.skipif(not INTERPRETED, reason=reason)
only_on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
DTYPES = [torch.bfloat16] if DEVICE == "cuda" else [torch.float32, torch.float16]
HALF = DTYPES[-1]
NAN = float("nan")

# Length of a row's error over the length of the row. Half precision rounds rotated queries, softmax
# weights and centred Keys, each to 11 (fp16) or 8 bits (bf16); fp32 only sums in another order.
ROW_ERROR = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# V^T V - I of bases stored in fp32: Gram-Schmidt is fp32, whatever the Keys are.
ORTHONORMAL = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-3}
MEAN_ERROR = 1e-6  # of the largest Key: fp32 sums
ENERGY_SHARE = 0.99  # of what the best basis of the same rank captures
NUM_BASES = 5


class Shape(NamedTuple):
    num_kv_heads: int
    group: int
    head_dim: int
    v_head_dim: int
    rank: int

    @property
    def num_heads(self):
        return self.num_kv_heads * self.group

    @property
    def sm_scale(self):
        return self.head_dim**-0.5


SMALL = Shape(2, 3, 64, 64, 16)
SHAPES = {
    "mha-d64-r16": Shape(4, 1, 64, 64, 16),
    "group3-d80-r32": Shape(2, 3, 80, 80, 32),
    "group4-d96-v64-r48": Shape(2, 4, 96, 64, 48),
    "group7-d128-r32": Shape(1, 7, 128, 128, 32),
    "group8-d64-v96-full-rank": Shape(1, 8, 64, 96, 64),
    "group7-d80-v48-full-rank": Shape(1, 7, 80, 48, 80),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
dtypes = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)
index_dtypes = pytest.mark.parametrize(
    "index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"]
)

LENGTHS = [  # 0, 1, 63, 120, 260, 1000 and 5000 slots; decode cuts 120 into two splits, extend 260
    [],
    [(0, 1)],
    [(TEXT, 63)],
    [(TEXT, 120)],
    [(TEXT, 200), (2, 60)],
    [(TEXT, 31), (0, 700), (TEXT, 1), (1, 268)],
    [
        (TEXT, 100),
        (0, 729),
        (1, 1),
        (TEXT, 1300),
        (2, 1024),
        (0, 33),
        (TEXT, 12),
        (3, 1500),
        (TEXT, 301),
    ],
]
CROWD = [[(TEXT, i), (i % NUM_BASES, 7 * i % 400), (TEXT, 9)] for i in range(600)]


@pytest.fixture(autouse=True)
def scratch_holds_garbage(monkeypatch):
    """What a kernel's wrapper allocates starts as NaN, or as indices far outside of every pool."""
    for name in ("empty", "empty_like"):

        def poisoned(*args, original=getattr(torch, name), **kwargs):
            tensor = original(*args, **kwargs)
            return tensor.fill_(NAN if tensor.is_floating_point() else 1 << 30)

        monkeypatch.setattr(torch, name, poisoned)


def normal(*size, dtype=torch.float32, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def nans(*size, dtype=torch.float32):
    return torch.full(size, NAN, dtype=dtype, device=DEVICE)


def nan_rows(n, *widths, dtype, strided):
    """NaN tensors [n, H, D] for each (H, D) of ``widths``; ``strided``: columns of one wider
    buffer."""
    if not strided:
        return [nans(n, *width, dtype=dtype) for width in widths]
    sizes = [heads * dim for heads, dim in widths]
    columns = nans(n, sum(sizes) + 5, dtype=dtype).split([*sizes, 5], dim=1)
    return [column.unflatten(1, width) for column, width in zip(columns, widths, strict=False)]


def make_qkv(n, shape, dtype, seed=50):
    """q, k and v of n tokens in the columns of one buffer, as a layer's projection gives them."""
    num_kv_heads, _, head_dim, v_head_dim, _ = shape
    widths = (shape.num_heads, head_dim), (num_kv_heads, head_dim), (num_kv_heads, v_head_dim)
    rows = nan_rows(n, *widths, dtype=dtype, strided=True)
    for i, row in enumerate(rows):
        # Larger queries make a softmax that some slots dominate.
        row.copy_(normal(*row.shape, seed=seed + i) * (1 if i else 2))
    return rows


def indptr(lens):
    return torch.tensor(
        [sum(lens[:i]) for i in range(len(lens) + 1)], dtype=torch.int32, device=DEVICE
    )


def assert_rows_close(actual, expected, dtype, times=1):
    """Each row [..., D] to ``times`` ROW_ERROR of its length; a row of zeros exactly. NaN fails."""
    error = (actual.float() - expected.float()).norm(dim=-1)
    share = torch.where(error == 0, error, error / expected.float().norm(dim=-1))
    assert share.max().item() <= times * ROW_ERROR[dtype]


@dataclass
class Batch:
    """Requests whose slots lie in pools that are NaN elsewhere, and in a req_to_token that is
    garbage elsewhere, but for slot 0 of request 0: what padding reads."""

    shape: Shape
    pools: LayerPools
    kv_indptr: list
    kv_indices: torch.Tensor
    req_to_token: torch.Tensor
    req_pool_indices: torch.Tensor
    kv_lens: torch.Tensor

    @property
    def requests(self):
        """Arguments of update_plan, after the plan."""
        return self.req_pool_indices, self.kv_lens

    def partition(self, prefix_lens=None):
        """Of all requests, and garbage elsewhere."""
        made = Partition(*self.req_to_token.shape, DEVICE)
        made.slots[1:], made.runs[1:] = 1 << 30, 1 << 30
        self.rebuild(made, prefix_lens=prefix_lens)
        return made

    def rebuild(self, made, requests=slice(None), kv_lens=None, prefix_lens=None):
        kv_lens = (self.kv_lens if kv_lens is None else kv_lens)[requests]
        max_len = max(kv_lens.tolist(), default=0)
        slot_to_basis, first_visual = self.pools.slot_to_basis, len(self.pools.k_text)
        made.rebuild(
            self.req_to_token, self.req_pool_indices[requests], kv_lens, slot_to_basis,
            first_visual,
            prefix_lens=prefix_lens, max_len=max_len,
        )  # fmt: skip

    def expected(self, kv_lens):
        pools = self.pools
        arguments = (
            self.req_to_token,
            self.req_pool_indices,
            kv_lens,
            pools.slot_to_basis,
            len(pools.k_text),
        )
        return reference.partition(*arguments)


def make_batch(
    prefixes,
    shape,
    dtype,
    seed=0,
    strided=False,
    index_dtype=torch.int64,
    slots=(0, 0),
    table=(0, 0),
):
    """``slots``: text and visual slots of the pools, and ``table``: the size of req_to_token, when
    that is more than the requests need."""
    rng = random.Random(seed)
    num_kv_heads, _, head_dim, v_head_dim, rank = shape
    used = [
        sum(n for p in prefixes for basis, n in p if (basis is TEXT) == text)
        for text in (True, False)
    ]
    num_text, num_visual = (
        max(n + n // 2 + 2, least) for n, least in zip(used, slots, strict=True)
    )
    key, value, narrow = (num_kv_heads, head_dim), (num_kv_heads, v_head_dim), (num_kv_heads, rank)
    k_text, v_text = nan_rows(1 + num_text, key, value, dtype=dtype, strided=strided)
    z, v_visual = nan_rows(num_visual, narrow, value, dtype=dtype, strided=strided)
    query_map, mean = nans(NUM_BASES, *key, rank, dtype=dtype), nans(NUM_BASES, *key)
    if strided:
        query_map, mean = (
            nans(NUM_BASES, 2, *t.shape[1:], dtype=t.dtype)[:, 0] for t in (query_map, mean)
        )
    for basis in {basis for prefix in prefixes for basis, _ in prefix} - {TEXT}:
        query_map[basis] = normal(*key, rank, seed=100 + basis) * head_dim**-0.5
        mean[basis] = normal(*key, seed=200 + basis) * 2

    # The last slots of each pool in any order, a third of them unused; and always the two where the
    # pools meet.
    free_text = rng.sample(range(num_text - used[0] - used[0] // 2, num_text), used[0])
    free_visual = rng.sample(range(num_visual - used[1] - used[1] // 2, num_visual), used[1])
    free_text[:1], free_visual[:1] = [num_text][: used[0]], [0][: used[1]]
    slot_to_basis = torch.full((num_visual,), -1, dtype=torch.int32)
    lens = [sum(n for _, n in prefix) for prefix in prefixes]
    num_requests, width = max(len(lens) + 3, table[0]), max(max(lens) + 5, table[1])
    req_to_token = torch.full((num_requests, width), -7, dtype=torch.int32)
    req_to_token[:, 1::2] = 2**31 - 1
    req_to_token[0, 0] = 0
    req_pool_indices = torch.tensor(
        rng.sample(range(1, num_requests), len(lens)), dtype=index_dtype
    )
    kv_indices = torch.empty(0, dtype=torch.int64)
    for row, prefix, n in zip(req_pool_indices, prefixes, lens, strict=True):
        slots = []
        for basis, count in prefix:
            rows = [(free_text if basis is TEXT else free_visual).pop() for _ in range(count)]
            slots += rows if basis is TEXT else [1 + num_text + row for row in rows]
            if basis is not TEXT:
                slot_to_basis[rows] = basis
        req_to_token[row, :n] = torch.tensor(slots, dtype=torch.int32)
        kv_indices = torch.cat([kv_indices, req_to_token[row, :n].long()])
    kv_indices = kv_indices.to(DEVICE)
    text, visual = (
        kv_indices[kv_indices <= num_text],
        kv_indices[kv_indices > num_text] - 1 - num_text,
    )
    for i, (pool, live) in enumerate(
        [(k_text, text), (v_text, text), (z, visual), (v_visual, visual)]
    ):
        pool[live] = normal(len(live), *pool.shape[1:], dtype=dtype, seed=1000 * seed + i)
    pools = LayerPools(k_text, v_text, z, v_visual, query_map, mean, slot_to_basis.to(DEVICE))
    on_device = (
        t.to(DEVICE)
        for t in (req_to_token, req_pool_indices, torch.tensor(lens, dtype=index_dtype))
    )
    return Batch(shape, pools, indptr(lens).tolist(), kv_indices, *on_device)


# --- decode ---------------------------------------------------------------------------------------


def decode_plan(batch, num_sms=132, max_requests=None):
    max_requests = max_requests or len(batch.kv_lens)
    return decode.make_plan(
        batch.partition(), max_requests, batch.shape.num_heads, batch.pools, num_sms
    )


def check_decode(batch, plan, dtype, logit_cap=0.0, q=None):
    shape, bs = batch.shape, len(batch.kv_lens)
    q = make_qkv(bs, shape, dtype)[0] if q is None else q
    out = nans(bs, shape.num_heads, shape.v_head_dim, dtype=dtype)
    decode.update_plan(plan, *batch.requests)
    assert (
        decode.decode(q, batch.pools, plan, indptr([1] * bs), shape.sm_scale, logit_cap, out=out)
        is out
    )
    expected = reference.decode(
        q.float(), batch.pools, batch.kv_indptr, batch.kv_indices, shape.sm_scale, logit_cap
    )
    assert_rows_close(out, expected, dtype)
    return out


@shapes
@dtypes
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_decode_equals_its_reference_for_every_kind_of_request_in_one_batch(strided, shape, dtype):
    index_dtype = torch.int32 if strided else torch.int64
    batch = make_batch(
        list(PREFIXES.values()), shape, dtype, strided=strided, index_dtype=index_dtype
    )
    assert batch.pools.k_text.is_contiguous() == batch.pools.z.is_contiguous() == (not strided)
    check_decode(batch, decode_plan(batch), dtype)


@dtypes
@pytest.mark.parametrize("num_sms", [132, 1])
@pytest.mark.parametrize("num_requests", [7, 600, 2000], ids="as-for-{}-requests".format)
def test_decode_equals_its_reference_from_0_to_5000_slots(
    num_requests, num_sms, dtype, monkeypatch
):
    chosen = decode.config(num_requests, 1, False)
    monkeypatch.setattr(decode, "config", lambda *_: chosen)
    index_dtype = torch.int32 if num_requests == 7 else torch.int64
    batch = make_batch(LENGTHS, Shape(1, 3, 64, 64, 16), dtype, index_dtype=index_dtype)
    plan = decode_plan(batch, num_sms)
    out = check_decode(batch, plan, dtype)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    # The merge takes 16 splits at a time.
    assert (
        plan.num_splits[4] > 1 and plan.num_splits[-1] > 16
        if num_sms > 1
        else plan.num_splits[-1] < 16
    )


@dtypes
@pytest.mark.parametrize("logit_cap", [1.5, 30.0])
def test_decode_caps_logits(logit_cap, dtype):
    batch = make_batch([PREFIXES["chat-1000"], PREFIXES["image-only-63"]], SMALL, dtype)
    check_decode(batch, decode_plan(batch), dtype, logit_cap)


def test_decode_of_scores_beyond_100_neither_overflows_nor_loses_a_split():
    dtype = DTYPES[0]
    batch = make_batch([PREFIXES["chat-1000"], PREFIXES["chat-63"]], SMALL, dtype)
    q, plan = make_qkv(2, SMALL, dtype)[0] * 20, decode_plan(batch)
    decode.update_plan(plan, *batch.requests)
    assert decode.decode(q, batch.pools, plan, indptr([1, 1]), SMALL.sm_scale).isfinite().all()
    if dtype == torch.float32:  # half precision rounds such scores by whole units
        check_decode(batch, plan, dtype, q=q)


@dtypes
def test_one_decode_plan_serves_batches_of_other_sizes_and_lengths(dtype):
    requests = list(PREFIXES.values())
    sizes = [requests, requests[6:7], requests[::-1], [[]], requests[:4], [requests[6]] * 2]
    options = dict(slots=(3000, 3000), table=(len(requests) + 3, 1100))
    batches = [
        make_batch(prefixes, SMALL, dtype, seed=i, **options) for i, prefixes in enumerate(sizes)
    ]
    plan = decode_plan(batches[0], max_requests=len(requests) + 3)
    for batch in batches:
        batch.rebuild(plan.partition)
        check_decode(batch, plan, dtype)
    decode.update_plan(plan, *(none[:0] for none in batches[0].requests))
    out = decode.decode(
        make_qkv(0, SMALL, dtype)[0], batches[0].pools, plan, indptr([]), SMALL.sm_scale
    )
    assert plan.num_items == 0 and out.shape == (0, SMALL.num_heads, SMALL.v_head_dim)


@only_on_a_gpu
def test_decode_equals_its_reference_for_600_requests():
    batch = make_batch(CROWD, SMALL, HALF)
    check_decode(batch, decode_plan(batch), HALF)


@only_on_a_gpu
def test_a_cuda_graph_of_decode_replays_other_lengths_and_contents():
    sizes = [[[(TEXT, 1)]] * 8, LENGTHS, list(PREFIXES.values())[:7], CROWD[-6:]]
    options = dict(slots=(20_000, 20_000), table=(16, 5100))
    captured, *others = (make_batch(p, SMALL, HALF, seed=i, **options) for i, p in enumerate(sizes))
    plan = decode_plan(captured)
    q, out = make_qkv(8, SMALL, HALF)[0], nans(8, SMALL.num_heads, SMALL.v_head_dim, dtype=HALF)
    arguments = q, captured.pools, plan, indptr([1] * 8), SMALL.sm_scale
    decode.update_plan(plan, *captured.requests)
    decode.decode(*arguments, out=out)  # compile
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode.decode(*arguments, out=out)
    for batch in [*others, *others[::-1]]:
        for pool, content in zip(captured.pools, batch.pools, strict=True):
            if isinstance(pool, torch.Tensor):
                pool.copy_(content)
        bs = len(batch.kv_lens)
        batch.rebuild(plan.partition)
        # Padding up to the captured size: slot 0, whose NaN must reach nobody else.
        indices = torch.nn.functional.pad(batch.req_pool_indices, (0, 8 - bs))
        lens = torch.nn.functional.pad(batch.kv_lens, (0, 8 - bs), value=1)
        decode.update_plan(plan, indices, lens)
        q.copy_(make_qkv(8, SMALL, HALF, seed=bs)[0])
        out.fill_(NAN)
        graph.replay()
        expected = reference.decode(
            q[:bs].float(), batch.pools, batch.kv_indptr, batch.kv_indices, SMALL.sm_scale
        )
        assert_rows_close(out[:bs], expected, HALF)


# --- extend ---------------------------------------------------------------------------------------

splits_or_not = pytest.mark.parametrize("splits", [True, False], ids=["splits", "whole"])
EXTEND_LENS = [1, 3, 30, 5, 64, 2, 9, 0, 50, 7]  # beside PREFIXES


def own_chunk(q, k, v, extend_lens, sm_scale, logit_cap):
    """Causal attention of each request over its own new tokens [n, Hq, Dv], and its natural
    log-sum-exp [n, Hq]."""
    outs, lses = [], []
    requests = zip(*(x.float().split(extend_lens) for x in (q, k, v)), strict=True)
    for q, k, v in requests:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("mhd,nhd->hmn", q, k) * sm_scale
        scores = logit_cap * (scores / logit_cap).tanh() if logit_cap else scores
        scores = scores.masked_fill(
            torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf")
        )
        outs.append(torch.einsum("hmn,nhd->mhd", scores.softmax(-1), v))
        lses.append(scores.logsumexp(-1))
    # Like FlashAttention's, the lse has its heads outermost in memory.
    return torch.cat(outs), torch.cat(lses, dim=1).T


def check_extend(prefixes, extend_lens, shape, dtype, splits, logit_cap=0.0):
    batch = make_batch(prefixes, shape, dtype, strided=True, index_dtype=torch.int32)
    q, k, v = make_qkv(sum(extend_lens), shape, dtype)
    # Few query rows for the multiprocessors are cut into splits, many are not.
    max_prefix, num_sms = int(batch.kv_lens.max()), 132 if splits else 1
    plan = extend.make_plan(batch.partition(), extend_lens, shape.num_heads, batch.pools, num_sms)
    extend.update_plan(plan, *batch.requests)
    assert plan.splits == splits == (plan.num_splits.max() > 1) or max_prefix < 200
    own_out, own_lse = own_chunk(q, k, v, extend_lens, shape.sm_scale, logit_cap)
    own_out, q_indptr, options = own_out.to(dtype), indptr(extend_lens), (shape.sm_scale, logit_cap)
    out = own_out.clone()
    assert extend.extend(q, out, own_lse, batch.pools, plan, q_indptr, *options) is out
    slots = batch.kv_indptr, batch.kv_indices
    assert_rows_close(
        out,
        reference.extend(q.float(), k, v, batch.pools, q_indptr.tolist(), *slots, *options),
        dtype,
    )
    for own, merged, prefix in zip(
        own_out.split(extend_lens), out.split(extend_lens), prefixes, strict=True
    ):
        assert prefix or torch.equal(own, merged)


@shapes
@dtypes
@splits_or_not
def test_extend_equals_its_reference_for_every_kind_of_prefix_in_one_batch(shape, splits, dtype):
    check_extend(list(PREFIXES.values()), EXTEND_LENS, shape, dtype, splits)


@dtypes
@splits_or_not
def test_extend_equals_its_reference_after_0_to_5000_slots(splits, dtype):
    check_extend(LENGTHS, [40, 5, 1, 13, 3, 2, 25], Shape(1, 3, 64, 64, 16), dtype, splits)


@dtypes
@splits_or_not
def test_extend_caps_the_logits_of_its_prefix(splits, dtype):
    prefixes = [PREFIXES["chat-1000"], PREFIXES["image-only-63"], []]
    check_extend(prefixes, [20, 9, 4], SMALL, dtype, splits, logit_cap=1.5)


def test_extend_merges_the_splits_of_requests_behind_more_than_a_thousand():
    # Nearly all without new tokens, since the interpreter takes its time for each.
    prefixes, shape = [LENGTHS[5], *[[]] * 1030, LENGTHS[4], LENGTHS[5]], Shape(1, 3, 64, 64, 16)
    check_extend(prefixes, [3] + [0] * 1029 + [1, 2, 3], shape, DTYPES[0], splits=True)


@splits_or_not
def test_extend_without_any_prefix_keeps_its_own_chunk_to_the_bit(splits):
    check_extend([[], []], [5, 7], SMALL, HALF, splits)


@dtypes
@splits_or_not
@pytest.mark.parametrize("shape", [SMALL, SHAPES["group7-d80-v48-full-rank"]], ids=str)
def test_extend_stored_equals_the_reference_of_text_that_follows_any_prefix(shape, splits, dtype):
    prefixes, shape = [*PREFIXES.values(), *LENGTHS], shape._replace(num_kv_heads=1)
    extend_lens = [*EXTEND_LENS, 40, 5, 1, 130, 3, 2, 25]
    whole = make_batch(
        [[*p, (TEXT, n)] for p, n in zip(prefixes, extend_lens, strict=True)],
        shape,
        dtype,
        strided=True,
    )
    plan = extend.make_plan(
        whole.partition(), extend_lens, shape.num_heads, whole.pools, 132 if splits else 1
    )
    extend.update_plan(plan, *whole.requests)
    assert plan.splits == splits == (plan.num_splits.max() > 1)
    q, q_indptr, options = (
        make_qkv(sum(extend_lens), shape, dtype)[0],
        indptr(extend_lens),
        (shape.sm_scale, 30.0),
    )
    out = extend.extend_stored(q, whole.pools, plan, q_indptr, *options)
    # The reference takes the new tokens' Keys and Values apart from the prefix.
    lens = [end - begin for begin, end in pairwise(whole.kv_indptr)]
    slots = list(zip(whole.kv_indices.split(lens), extend_lens, strict=True))
    new = torch.cat([row[len(row) - n :] for row, n in slots])
    prefix_lens = [len(row) - n for row, n in slots]
    kv_indices = torch.cat([row[: len(row) - n] for row, n in slots])
    k, v = whole.pools.k_text[new], whole.pools.v_text[new]
    kv_indptr = indptr(prefix_lens).tolist()
    expected = reference.extend(
        q.float(), k, v, whole.pools, q_indptr.tolist(), kv_indptr, kv_indices, *options
    )
    assert_rows_close(out, expected, dtype)


def test_cards_with_little_shared_memory_take_two_stages(monkeypatch):
    def stages(config):
        arguments = (
            1,
            1,
            64,
            32,
            64,
            16,
            config,
            False,
            False,
            True,
            False,
            (),
            (),
            torch.device("cpu"),
        )
        constants = attend._launches.__wrapped__(*arguments)[0]._constants
        return constants["STAGES"], constants["VISUAL_STAGES"]

    configs = decode.config(1, 1, False)[0], decode.config(2000, 1, False)[0], extend.TILING.config
    assert [stages(config) for config in configs] == [(2, 3), (2, 2), (3, 3)]
    monkeypatch.setattr(attend, "has_large_shared_memory", lambda device: False)
    assert [stages(config) for config in configs] == [(2, 2)] * 3


# --- partition ------------------------------------------------------------------------------------


def check_partition(made, batch, kv_lens=None, prefix_lens=None):
    kv_lens = batch.kv_lens if kv_lens is None else kv_lens
    prefixes = batch.expected(kv_lens if prefix_lens is None else prefix_lens)
    for request, parts, prefix in zip(
        batch.req_pool_indices.tolist(),
        batch.expected(kv_lens),
        prefixes,
        strict=True,
    ):
        text, visual, runs = parts
        assert (made.num_visual[request], made.num_runs[request]) == (len(visual), len(runs))
        assert torch.equal(made.slots[request, : len(text)], text)
        assert torch.equal(made.slots[request, made.width - len(visual) :], visual)
        assert torch.equal(made.runs[request, : len(runs)], runs)
        if prefix_lens is not None:
            assert made.prefix_visual[request] == len(prefix[1])
    assert made.num_visual[0] == 0


def random_prefix(rng):
    pieces = rng.choice([0, 1, 1, 2, 3, 8])
    return [
        (rng.choice([TEXT, *range(NUM_BASES)]), rng.choice([1, 2, 31, 32, 33, 600]))
        for _ in range(pieces)
    ]


@pytest.mark.parametrize("block", [16, 1024])
@pytest.mark.parametrize("seed", range(6))
def test_a_rebuilt_partition_is_that_of_its_reference(seed, block, monkeypatch):
    monkeypatch.setattr(partition, "BLOCK", block)
    rng = random.Random(seed)
    index_dtype = torch.int32 if seed % 2 else torch.int64
    batch = make_batch(
        [random_prefix(rng) for _ in range(5)], SMALL, HALF, seed=seed, index_dtype=index_dtype
    )
    prefix_lens = torch.tensor(
        [rng.randint(0, n) for n in batch.kv_lens.tolist()], dtype=index_dtype, device=DEVICE
    )
    check_partition(batch.partition(prefix_lens), batch, prefix_lens=prefix_lens)


def test_the_partition_of_0_to_5000_slots_is_that_of_its_reference():
    batch = make_batch(LENGTHS, SMALL, HALF)
    check_partition(batch.partition(), batch, prefix_lens=batch.kv_lens)


def test_the_partition_of_600_requests_is_that_of_its_reference_and_planned():
    batch = make_batch(CROWD, SMALL, HALF)
    made = batch.partition()
    check_partition(made, batch)
    check_plan(decode.make_plan(made, 600, SMALL.num_heads, batch.pools), batch, 64)


def test_a_request_is_rebuilt_alone_after_its_slots_changed():
    prefixes = [
        [(TEXT, 70), (1, 90), (TEXT, 3)],
        [(TEXT, 30), (0, 60), (2, 20), (TEXT, 9)],
        [(3, 40), (TEXT, 1)],
    ]
    old, new = (
        make_batch(p, SMALL, HALF, table=(9, 300), slots=(400, 500))
        for p in (prefixes, prefixes[::-1])
    )
    made = old.partition()
    kept = made.slots[old.req_pool_indices[:2]].clone(), made.runs[old.req_pool_indices[:2]].clone()
    # As when the prefix cache keeps another request's slots: others at the same length, with other
    # runs.
    request = old.req_pool_indices[2:]
    new.req_to_token[request] = new.req_to_token[new.req_pool_indices[2:]]
    new.req_pool_indices = old.req_pool_indices
    new.rebuild(made, slice(2, 3))
    text, visual, runs = new.expected(new.kv_lens)[2]
    assert made.num_visual[request] == len(visual) and made.num_runs[request] == len(runs)
    assert torch.equal(made.slots[request[0], : len(text)], text)
    assert torch.equal(made.slots[request[0], made.width - len(visual) :], visual)
    assert torch.equal(kept[0], made.slots[old.req_pool_indices[:2]])
    assert torch.equal(kept[1], made.runs[old.req_pool_indices[:2]])


@dtypes
def test_appending_a_token_a_step_equals_a_rebuild(dtype):
    steps = 20
    prefixes = [[*prefix, (TEXT, steps)] for prefix in PREFIXES.values()]
    batch = make_batch(prefixes, SMALL, dtype)
    made = Partition(*batch.req_to_token.shape, DEVICE)
    batch.rebuild(made, kv_lens=batch.kv_lens - steps)
    plan = decode.make_plan(made, len(prefixes), SMALL.num_heads, batch.pools)
    for step in range(1, steps + 1):
        for _ in range(1 + step % 2):  # a step that is planned twice changes nothing
            decode.update_plan(
                plan, batch.req_pool_indices, batch.kv_lens - steps + step, batch.req_to_token
            )
        if step in (1, 2, steps):
            check_partition(made, batch, batch.kv_lens - steps + step)
    check_decode(batch, plan, dtype)
    batch.rebuild(made)
    check_partition(made, batch)


def test_padding_leaves_requests_alone_and_has_one_slot():
    batch = make_batch([[(TEXT, 40), (1, 50), (TEXT, 9)], [(0, 33), (TEXT, 2)]], SMALL, HALF)
    plan = decode_plan(batch, max_requests=8)
    indices = torch.nn.functional.pad(batch.req_pool_indices, (0, 6))
    lens = torch.nn.functional.pad(batch.kv_lens, (0, 6), value=1)
    decode.update_plan(plan, indices, lens, batch.req_to_token)
    check_partition(plan.partition, batch)
    assert plan.partition.slots[0, 0] == 0
    items = plan.items[: plan.num_items].tolist()
    padding = [item for item in items if item[0] >= 2]
    assert len(padding) == 6 and all(
        item[2:6] == [0, 1, 0, 0] and item[7] == item[10] == 0 for item in padding
    )
    batch.rebuild(plan.partition)
    made = plan.partition
    made.rebuild(
        batch.req_to_token,
        indices,
        lens,
        batch.pools.slot_to_basis,
        len(batch.pools.k_text),
        prefix_lens=lens,
    )
    check_partition(made, batch)


def test_runs_beyond_the_table_are_left_out_and_overwrite_nothing(monkeypatch):
    monkeypatch.setattr(partition, "max_runs", lambda width: 3)
    images = [[(i % NUM_BASES, 40 + i) for i in range(n)] for n in (3, 2, 7, 3, 1, 5)]
    prefixes = [[(TEXT, 5), *prefix, (TEXT, 3)] for prefix in images]
    batch = make_batch(prefixes, SMALL, HALF)
    made = batch.partition()
    assert made.runs.shape[1] == 3
    plan = decode.make_plan(made, len(prefixes), SMALL.num_heads, batch.pools, num_sms=2)
    decode.update_plan(plan, *batch.requests)
    for request, (_, _, runs) in zip(
        batch.req_pool_indices.tolist(),
        batch.expected(batch.kv_lens),
        strict=True,
    ):
        n = min(3, len(runs))
        assert made.num_runs[request] == n and torch.equal(made.runs[request, :n], runs[:n])
    q = make_qkv(len(prefixes), SMALL, HALF)[0]
    out = decode.decode(q, batch.pools, plan, indptr([1] * len(prefixes)), SMALL.sm_scale)
    first_visual = len(batch.pools.k_text)
    kept = []
    for text, visual, runs in batch.expected(batch.kv_lens):
        kept.append(torch.cat([text, visual[: runs[:3, 0].max()] + first_visual]))
    kv_indptr = indptr([len(slots) for slots in kept]).tolist()
    expected = reference.decode(q.float(), batch.pools, kv_indptr, torch.cat(kept), SMALL.sm_scale)
    assert_rows_close(out, expected, HALF)


def test_the_run_table_takes_little_beside_the_slots():
    for width in (2048, 8192, 131072):
        made = partition.partition_bytes(3, width) / 3
        assert 4 * width < made < 4 * width * (1.12 if width > 8000 else 1.35)
    allocated = Partition(3, 8192, DEVICE)
    tensors = [x for x in vars(allocated).values() if isinstance(x, torch.Tensor)]
    assert sum(x.nbytes for x in tensors) == partition.partition_bytes(3, 8192)


# --- expand ---------------------------------------------------------------------------------------


def check_expand(prefixes, extend_lens, shape, dtype):
    """Every token of prefix and chunk once, text before images; and that attention over them is the
    extend's."""
    batch = make_batch(prefixes, shape, dtype, strided=True, index_dtype=torch.int32)
    q, k, v = make_qkv(sum(extend_lens), shape, dtype)
    totals = [int(prefix) + new for prefix, new in zip(batch.kv_lens, extend_lens, strict=True)]
    q_indptr, kv_indptr = indptr(extend_lens), indptr(totals)
    k_out = nans(sum(totals) + 3, shape.num_kv_heads, shape.head_dim, dtype=dtype)
    v_out = nans(sum(totals) + 3, shape.num_kv_heads, shape.v_head_dim, dtype=dtype)
    made = batch.partition()
    expand.expand(
        batch.pools, made, *batch.requests, q_indptr, kv_indptr, k, v, k_out, v_out, max(totals)
    )
    assert k_out[sum(totals) :].isnan().all() and v_out[sum(totals) :].isnan().all()
    parts = batch.expected(batch.kv_lens)
    for i, (text, visual, _) in enumerate(parts):
        own = slice(q_indptr[i], q_indptr[i + 1])
        slots = torch.cat([text, visual + len(batch.pools.k_text)])
        keys, values = reference.expand(slots, batch.pools)
        of_request = slice(kv_indptr[i], kv_indptr[i + 1])
        assert_rows_close(k_out[of_request], torch.cat([keys, k[own].float()]), dtype)
        assert torch.equal(v_out[of_request], torch.cat([values.to(dtype), v[own]]))
        if extend_lens[i]:
            attended = attend_all(q[own], k_out[of_request], v_out[of_request], shape)
            empty, lens = [0, extend_lens[i]], [0, len(slots)]
            exact = reference.extend(
                q[own].float(), k[own], v[own], batch.pools, empty, lens, slots, shape.sm_scale
            )
            # A Key at full width is rounded with its mean in it.
            assert_rows_close(attended, exact, dtype, times=2)


def attend_all(q, k, v, shape):
    """Attention [m, Hq, Dv] of the last m of n tokens over all before and themselves."""
    m, n = len(q), len(k)
    k, v = (x.float().repeat_interleave(shape.group, 1) for x in (k, v))
    scores = torch.einsum("mhd,nhd->hmn", q.float(), k) * shape.sm_scale
    future = torch.ones(m, n, dtype=torch.bool, device=q.device).triu(n - m + 1)
    return torch.einsum("hmn,nhd->mhd", scores.masked_fill(future, float("-inf")).softmax(-1), v)


@shapes
@dtypes
def test_expand_equals_its_reference_for_every_kind_of_prefix_in_one_batch(shape, dtype):
    check_expand(list(PREFIXES.values()), EXTEND_LENS, shape, dtype)


@dtypes
def test_expand_equals_its_reference_after_0_to_5000_slots(dtype):
    check_expand(LENGTHS, [40, 5, 1, 13, 3, 2, 25], Shape(1, 3, 64, 64, 16), dtype)


# --- plan -----------------------------------------------------------------------------------------


def check_plan(plan, batch, align, wanted_share=1.0, kv_lens=None):
    """The items of each tile cover all slots of its request once, with their runs, and stay within
    bounds."""
    kv_lens = batch.kv_lens if kv_lens is None else kv_lens
    made, slot_to_basis = plan.partition, batch.pools.slot_to_basis
    plan.update(batch.req_pool_indices, kv_lens, align=align, wanted_share=wanted_share)
    expected = batch.expected(kv_lens)
    tiles, splits, starts = (
        column[: len(kv_lens)].tolist()
        for column in (plan.num_tiles, plan.num_splits, plan.partial_start)
    )
    items = plan.items[: plan.num_items].tolist()
    assert len(items) <= plan.max_items(sum(tiles)) <= len(plan.items)
    by_tile, partials = {}, []
    for item in items:
        request, tile, a, b, c, d, partial, num_runs, run_end, basis = item[:10]
        req_pool_index, visual_start, first_run, num_text = item[10:14]
        text, visual, runs = expected[request]
        slots, table = made.slots[req_pool_index], made.runs[req_pool_index]
        assert req_pool_index == batch.req_pool_indices[request] and num_text == len(text)
        assert torch.equal(slots[a:b], text[a:b])
        assert torch.equal(slots[visual_start + c : visual_start + d], visual[c:d])
        ends, begin, bases = table[first_run : first_run + num_runs].tolist(), c, []
        for end, of_run in ends:
            bases += [of_run] * (min(end, d) - begin)
            begin = min(end, d)
        assert bases == slot_to_basis[visual[c:d].long()].tolist()
        assert num_runs == sum(
            start < d and end > c for start, end in pairwise([0, *runs[:, 0].tolist()])
        )
        assert not num_runs or [run_end, basis] == [min(ends[0][0], d), ends[0][1]]
        by_tile.setdefault((request, tile), []).append((a, b, c, d, partial))
    assert set(by_tile) == {(i, tile) for i in range(len(kv_lens)) for tile in range(tiles[i])}
    counts = [(len(text), len(visual)) for text, visual, _ in expected]
    for (i, tile), own in by_tile.items():
        (num_text, num_visual), num_splits = counts[i], splits[i]
        assert [slot for begin, end, *_ in own for slot in range(begin, end)] == list(
            range(num_text)
        )
        assert [slot for *_, begin, end, _ in own for slot in range(begin, end)] == list(
            range(num_visual)
        )
        # Whole blocks, but at the end of each kind.
        assert all(begin % align == 0 for begin, end, *_ in own if begin < end)
        assert all(begin % align == 0 for *_, begin, end, _ in own if begin < end)
        first = starts[i] + tile * num_splits
        rows = [-1] if num_splits == 1 else list(range(first, first + num_splits))
        assert [partial for *_, partial in own] == rows
        partials += rows if num_splits > 1 else []
    assert len(set(partials)) == len(partials) and max(partials, default=-1) < plan.max_partials
    # No item is much longer than an equal share, or than the shortest split worth its merge.
    cost = sum(
        t * (m * plan.text_cost + n * plan.visual_cost)
        for t, (m, n) in zip(tiles, counts, strict=True)
    )
    shortest = max(plan.min_split, align * plan.text_cost)
    limit = 1.25 * max(cost / max(1, plan.wanted_items * wanted_share), shortest) + 1
    limit += align * (plan.text_cost + plan.visual_cost)
    assert all(
        (b - a) * plan.text_cost + (d - c) * plan.visual_cost <= limit
        for _, _, a, b, c, d, *_ in items
    )


@pytest.mark.parametrize("seed", range(24))
def test_a_plan_covers_every_slot_of_a_random_batch_once_and_stays_in_its_bounds(seed):
    rng = random.Random(seed)
    shape = rng.choice(list(SHAPES.values()))._replace(num_kv_heads=1)
    bs = rng.choice([1, 2, 3, 5, 14])
    prefixes = [random_prefix(rng) for _ in range(bs)] if seed % 3 else [random_prefix(rng)] * bs
    batch = make_batch(prefixes, shape, HALF, seed=seed)
    check_plan(
        decode_plan(batch, num_sms=rng.choice([1, 2, 5, 132])),
        batch,
        rng.choice([32, 64, 128]),
        0.5,
    )
    # A prefill that reads a prefix of what its requests hold.
    extend_lens, num_sms = (
        [rng.choice([0, 1, 2, 40, 100]) for _ in prefixes],
        rng.choice([1, 5, 132, 500]),
    )
    prefix_lens = torch.tensor([rng.randint(0, n) for n in batch.kv_lens.tolist()], device=DEVICE)
    made = batch.partition(prefix_lens)
    plan = extend.make_plan(made, extend_lens, shape.num_heads, batch.pools, num_sms)
    check_plan(plan, batch, 64, kv_lens=prefix_lens)


def test_a_plan_that_wants_no_splits_makes_one_item_a_tile():
    batch = make_batch(LENGTHS, SMALL, HALF)
    plan = Plan(
        batch.partition(),
        7,
        batch.pools,
        tile_rows=32,
        wanted_items=None,
        num_tiles=list(range(1, 8)),
    )
    check_plan(plan, batch, 64)
    assert plan.num_splits.tolist() == [1] * 7 and plan.num_items == 28


def test_an_updated_plan_keeps_nothing_of_the_batch_before():
    batches = [LENGTHS, [[], LENGTHS[5]], [*LENGTHS[::-1], [(TEXT, 2000), (4, 7)]], [[]], LENGTHS]
    batches = [
        make_batch(prefixes, SMALL, HALF, seed=i, table=(12, 5100))
        for i, prefixes in enumerate(batches)
    ]
    plan = decode_plan(batches[0], max_requests=9)
    for batch in batches:
        batch.rebuild(plan.partition)
        check_plan(plan, batch, 32)


def test_a_plan_refuses_more_requests_than_it_was_made_for_and_too_few_rows_of_partial_results():
    batch = make_batch(LENGTHS, SMALL, HALF)
    with pytest.raises(ValueError, match="at most 6 requests, got 7"):
        decode.update_plan(decode_plan(batch, max_requests=6), *batch.requests)
    partials = decode_plan(batch).partials
    with pytest.raises(ValueError, match="rows of partial results"):
        extend.make_plan(batch.partition(), [1] * 7, SMALL.num_heads, batch.pools, 132, partials)


# --- store ----------------------------------------------------------------------------------------


@dtypes
@index_dtypes
@pytest.mark.parametrize("kinds", ["text", "visual", "both"])
@pytest.mark.parametrize(
    "shape", [SMALL, SHAPES["group4-d96-v64-r48"], SHAPES["group8-d64-v96-full-rank"]], ids=str
)
def test_store_writes_the_rows_of_its_reference_and_no_other(shape, kinds, index_dtype, dtype):
    prefix = {
        "text": [(TEXT, 9)],
        "visual": [(1, 7)],
        "both": [(TEXT, 5), (0, 4), (TEXT, 3), (2, 6)],
    }[kinds]
    ours, theirs = (
        make_batch([prefix], shape, dtype, strided=strided) for strided in (True, False)
    )
    _, k, v = make_qkv(len(ours.kv_indices), shape, dtype)
    workspaces = [nans(12, *k.shape[1:], dtype=dtype) for _ in range(2)]
    workspace_rows = (ours.kv_indices >= len(ours.pools.k_text)).cumsum(0) - 1 + 2
    for write, batch, workspace in zip(
        (store, reference.store), (ours, theirs), workspaces, strict=True
    ):
        visual = [] if kinds == "text" else [workspace, workspace_rows]
        write(k, v, ours.kv_indices.to(index_dtype), batch.pools, *visual)
    for got, expected in zip(
        [*ours.pools, workspaces[0]], [*theirs.pools, workspaces[1]], strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    # Between the rows of strided pools.
    assert (
        ours.pools.k_text._base[:, -5:].isnan().all() and ours.pools.z._base[:, -5:].isnan().all()
    )


# --- compress -------------------------------------------------------------------------------------

# Eigenvalues of the covariance; the first four are like those of images' Keys.
SPECTRA = {
    "exp-8": lambda i: (-i / 8).exp(),
    "exp-20": lambda i: (-i / 20).exp(),
    "inverse": lambda i: 1 / (1 + i),
    "inverse-square": lambda i: (1 + i) ** -2,
    "three-spikes": lambda i: torch.where(i < 3, 1e4, 1.0),
}
compress_sizes = pytest.mark.parametrize(
    ("num_kv_heads", "head_dim", "rank"),
    [(1, 64, 16), (1, 80, 32), (2, 96, 48), (1, 128, 32), (1, 64, 64)],
)


@dataclass
class Compressed:
    keys: torch.Tensor  # [L, n, H, D]
    segments: list  # (first row, end row, basis)
    rows: torch.Tensor  # of z, per Key
    pools: CompressedPools

    def parts(self):
        """(keys [n, H, D], z [n, H, r], V [H, D, r], mean [H, D]) of every layer and segment."""
        z, query_map, mean, _ = self.pools[:4]
        for i, keys in enumerate(self.keys):
            for first, end, basis in self.segments:
                yield (
                    keys[first:end],
                    z[i, self.rows[first:end]],
                    query_map[i, basis],
                    mean[i, basis],
                )


def make_keys(n, num_kv_heads, head_dim, dtype, spectrum="exp-8", offset=0.0, scale=1.0, layers=1):
    """[layers, n, H, D] inside a larger workspace of NaN: ``spectrum`` in random directions, and a
    mean of ``offset`` times the largest deviation in every channel."""
    turn = torch.linalg.qr(normal(layers, num_kv_heads, head_dim, head_dim)).Q
    deviation = SPECTRA[spectrum](torch.arange(head_dim, dtype=torch.float32, device=DEVICE)).sqrt()
    keys = torch.einsum(
        "lnhd,lhde->lnhe", normal(layers, n, num_kv_heads, head_dim, seed=1) * deviation, turn
    )
    keys += offset * deviation.max() * normal(layers, 1, num_kv_heads, head_dim, seed=2).sign()
    workspace = nans(layers + 1, n + 3, num_kv_heads, head_dim, dtype=dtype)
    workspace[:layers, :n] = (scale * keys).to(dtype)
    return workspace[:layers, :n]


def run_compress(keys, lens, rank, map_dtype=torch.float32, weights=None):
    """Compress segments of ``lens`` into pools of NaN with strided z, and look that nothing else
    was written."""
    rng = random.Random(0)
    layers, n, num_kv_heads, head_dim = keys.shape
    used = rng.sample(range(len(lens) + 2), len(lens))
    bounds = indptr(lens).tolist()
    segments, rows = (
        [(*bound, basis) for bound, basis in zip(pairwise(bounds), used, strict=True)],
        torch.tensor(rng.sample(range(n + 9), n), device=DEVICE),
    )
    wide = nans(layers, n + 9, num_kv_heads * rank + 16, dtype=keys.dtype)
    z = wide[..., :-16].unflatten(-1, (num_kv_heads, rank))
    bases = nans(layers, len(lens) + 2, num_kv_heads + 1, head_dim, rank, dtype=map_dtype)
    query_map, mean = bases[:, :, :-1], nans(*bases.shape[:-1])[:, :, 1:]
    pools = CompressedPools(z, query_map, mean, 107)
    uploaded, start = (
        compress.Segments.upload(segments, DEVICE),
        compress.start_vectors(head_dim, rank, DEVICE),
    )
    compress.compress(keys, (rows + 107).int(), uploaded, pools, start, weights)
    spare_rows, spare = (
        sorted({*range(n + 9)} - {*rows.tolist()}),
        sorted({*range(len(lens) + 2)} - {*used}),
    )
    for untouched in (
        z[:, spare_rows],
        wide[..., -16:],
        query_map[:, spare],
        mean[:, spare],
        bases[:, :, -1],
    ):
        assert untouched.isnan().all()
    return Compressed(keys, segments, rows, pools)


def covariance(keys, weight=1.0):
    centred = ((keys.double() - keys.double().mean(dim=0)) * weight).transpose(0, 1)
    return centred.mT @ centred


def captured(matrix, vectors):
    return (vectors.double().mT @ matrix @ vectors.double()).diagonal(dim1=1, dim2=2).sum(-1)


def check_compressed(result, dtype):
    """Bases in fp32 are orthonormal and capture what eigh does, means are the Keys', and z is the
    reference's."""
    for keys, _, vectors, mean in result.parts():
        assert (
            vectors.mT @ vectors - torch.eye(vectors.shape[-1], device=DEVICE)
        ).abs().max() <= ORTHONORMAL[dtype]
        matrix = covariance(keys)
        most = torch.linalg.eigvalsh(matrix)[:, -vectors.shape[-1] :].sum(-1)
        assert (captured(matrix, vectors) >= ENERGY_SHARE * most).all()
        assert (
            mean - keys.double().mean(dim=0)
        ).abs().max() <= MEAN_ERROR * keys.float().abs().max()
    check_projection(result, dtype)


def check_projection(result, dtype):
    """z is what reference.compress makes with the kernel's own bases, to ROW_ERROR of the longest
    row."""
    for keys, z, vectors, mean in result.parts():
        expected = reference.compress(keys, vectors.float(), mean)
        assert (z.float() - expected).norm(dim=-1).max() <= ROW_ERROR[dtype] * expected.norm(
            dim=-1
        ).max()


@dtypes
@compress_sizes
def test_compress_of_segments_of_many_lengths_in_several_layers(
    num_kv_heads, head_dim, rank, dtype
):
    lens = [1, 3, rank - 1, rank, 64, 1000]
    keys = make_keys(sum(lens), num_kv_heads, head_dim, dtype, offset=2.0, layers=num_kv_heads)
    check_compressed(run_compress(keys, lens, rank), dtype)


@dtypes
@compress_sizes
def test_compress_of_two_keys_gives_an_orthonormal_basis(num_kv_heads, head_dim, rank, dtype):
    check_compressed(
        run_compress(make_keys(2, num_kv_heads, head_dim, dtype, offset=2.0), [2], rank), dtype
    )


@dtypes
@pytest.mark.parametrize("offset", [0.0, 50.0], ids=["centred", "mean-of-50-sigma"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_compress_captures_the_energy_that_eigh_does(spectrum, offset, dtype):
    check_compressed(run_compress(make_keys(600, 1, 64, dtype, spectrum, offset), [600], 16), dtype)


@dtypes
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_compress_does_not_depend_on_the_scale_of_keys(scale, dtype):
    check_compressed(run_compress(make_keys(300, 1, 64, dtype, scale=scale), [200, 100], 16), dtype)


@dtypes
def test_compress_on_cards_with_little_shared_memory(dtype, monkeypatch):
    monkeypatch.setattr(compress, "has_large_shared_memory", lambda device: False)
    check_compressed(run_compress(make_keys(300, 1, 128, dtype, offset=2.0), [200, 100], 32), dtype)


@dtypes
def test_compress_of_equal_keys_gives_zeros_and_a_basis_all_the_same(dtype):
    keys = make_keys(40, 2, 64, dtype)
    keys[:] = keys[:, :1].clone()
    result = run_compress(keys, [40], 16)
    check_compressed(result, dtype)
    (_, z, _, mean), *_ = result.parts()
    assert torch.equal(z, torch.zeros_like(z)) and torch.equal(mean, keys[0, 0].float())


@dtypes
def test_weighted_compress_captures_what_the_basis_paper_does(dtype):
    keys, rank = make_keys(340, SMALL.num_kv_heads, 64, dtype, "exp-20", offset=3.0, layers=2), 16
    # Queries of each layer and segment, whose channels differ in size by two orders of magnitude.
    windows = normal(2, 2, 32, SMALL.num_heads, 64, seed=9) * torch.logspace(
        -1, 1, 64, device=DEVICE
    )
    weights = torch.stack(
        [paper.channel_weights(window, SMALL.num_kv_heads) for window in windows.flatten(0, 1)]
    )
    result = run_compress(keys, [300, 40], rank, weights=weights.unflatten(0, (2, 2)))
    check_projection(result, dtype)
    for window, weight, (own_keys, _, vectors, _) in zip(
        windows.flatten(0, 1),
        weights,
        result.parts(),
        strict=True,
    ):
        matrix = covariance(own_keys, weight)
        theirs = captured(matrix, paper.fit(own_keys, window, rank).query_map)
        assert (captured(matrix, vectors) >= ENERGY_SHARE * theirs).all()
        # The weights matter: the best basis without them captures less.
        plain = torch.linalg.eigh(covariance(own_keys)).eigenvectors[..., -rank:]
        assert (captured(matrix, plain) < ENERGY_SHARE * theirs).all()


def test_compress_into_narrow_bases_gives_the_same_bits_twice():
    keys = make_keys(1100, 2, 64, HALF, layers=2)
    once, again = (run_compress(keys, [1000, 100], 16, map_dtype=HALF) for _ in range(2))
    check_projection(once, HALF)
    for a, b in zip(once.pools[:3], again.pools[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("limit", "num_groups"), [(1, 6), (40_000, 4), (80_000, 2)])
def test_compress_in_little_scratch_gives_the_same_bits(limit, num_groups, monkeypatch):
    # A part of 512 Keys takes 16,640 bytes, a basis 2,048 more.
    lens, weights = [520, 3, 64], normal(2, 3, 1, 64, seed=4).abs()
    keys = make_keys(sum(lens), 1, 64, HALF, layers=2)
    whole = run_compress(keys, lens, 16, weights=weights)
    monkeypatch.setattr(compress, "SCRATCH_BYTES", limit)
    bound = compress.scratch_bytes(max(lens), 1, 64, 16, keys.dtype.itemsize, is_coded=False)
    groups, work = [], compress._compress

    def listed(k, slots, segments, group, *arguments):
        scratch = work(k, slots, segments, group, *arguments)
        groups.append((group, len(k)))
        assert 4 * len(scratch) <= bound
        return scratch

    monkeypatch.setattr(compress, "_compress", listed)
    parts = run_compress(keys, lens, 16, weights=weights)
    assert sum((group.stop - group.start) * layers for group, layers in groups) == 2 * len(lens)
    assert len(groups) == num_groups
    for a, b in zip(whole.pools[:3], parts.pools[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@only_on_a_gpu
def test_rows_beyond_2_31_elements_are_addressed():
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    shape, prefixes = Shape(1, 4, 128, 128, 32), [PREFIXES["chat-63"], PREFIXES["chat-1000"]]
    # The requests get the last slots, and the first visual one.
    batch = make_batch(
        prefixes, shape, HALF, strided=True, slots=(2**31 // 256 + 1000, 2**31 // 160 + 1000)
    )
    pools, first_visual_slot = batch.pools, len(batch.pools.k_text)
    is_visual = batch.kv_indices >= first_visual_slot
    text, visual = batch.kv_indices[~is_visual], batch.kv_indices[is_visual] - first_visual_slot
    assert text.max() * pools.k_text.stride(0) > 2**31 and visual.max() * pools.z.stride(0) > 2**31
    check_decode(batch, decode_plan(batch), HALF)
    _, k, v = make_qkv(len(is_visual), shape, HALF)
    workspace = nans(1, len(visual), 1, 128, dtype=HALF)
    store(k, v, batch.kv_indices, pools, workspace[0], is_visual.cumsum(0) - 1)
    assert torch.equal(pools.k_text[text], k[~is_visual]) and torch.equal(
        pools.v_text[text], v[~is_visual]
    )
    assert torch.equal(workspace[0], k[is_visual]) and torch.equal(
        pools.v_visual[visual], v[is_visual]
    )
    layers = CompressedPools(
        pools.z[None], pools.query_map[None], pools.mean[None], first_visual_slot
    )
    result = Compressed(workspace, [(0, len(visual), 0)], visual, layers)
    uploaded, start = (
        compress.Segments.upload(result.segments, DEVICE),
        compress.start_vectors(128, 32, DEVICE),
    )
    compress.compress(workspace, batch.kv_indices[is_visual], uploaded, layers, start)
    check_projection(result, HALF)
