"""Kernels over visual rows of every format and over FP8 text, against their plain-torch references.

How to run them: test_kernels.py. Triton's interpreter has no products of bf16, so that there it is
fp16 and fp32.
"""

from itertools import pairwise

import pytest
import test_kernels
import torch
from test_kernels import (
    DEVICE,
    DTYPES,
    HALF,
    NUM_BASES,
    TEXT,
    Shape,
    assert_rows_close,
    make_batch,
    make_qkv,
    nans,
    normal,
)

from sglang_rotatek.basis import Basis, pca
from sglang_rotatek.kernels import coded, compress, decode, expand, extend, reference
from sglang_rotatek.kernels.coded import FP8
from sglang_rotatek.kernels.pools import CompressedPools, VisualRows
from sglang_rotatek.kernels.row_format import RowFormat
from sglang_rotatek.kernels.store import store

pytestmark = test_kernels.pytestmark
scratch_holds_garbage = test_kernels.scratch_holds_garbage

FORMATS = {
    "16+h4-v4": RowFormat(16, 4, 4),
    "16+h2-v4": RowFormat(16, 2, 4),
    "8+h4-v2": RowFormat(8, 4, 2),
    "16+h2-v2": RowFormat(16, 2, 2),
    "16+h4-v8": RowFormat(16, 4, 8),
    "16+h4-v16": RowFormat(16, 4, 16),
    "r32-v8": RowFormat(32, 16, 8),
    "r32-v4": RowFormat(32, 16, 4),
    "r16-v2": RowFormat(16, 16, 2),
    "r16-v16": RowFormat(16, 16, 16),
}
formats = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


def with_format(batch, form, dtype, fp8_text=False, seed=0):
    """The batch over visual rows of ``form``, every other byte of which is 255: NaN, where it is a
    float."""
    pools, shape = batch.pools, batch.shape
    heads, dim, v_dim, num_rows = shape.num_kv_heads, shape.head_dim, shape.v_head_dim, len(pools.z)
    row_bytes = heads * form.row_bytes(dim, v_dim, dtype.itemsize)
    memory = torch.full((1, num_rows * row_bytes), 255, dtype=torch.uint8, device=DEVICE)
    rows = VisualRows(
        *(x if x is None else x[0] for x in VisualRows.view(memory, form, heads, dim, v_dim, dtype))
    )
    live = batch.kv_indices[batch.kv_indices >= len(pools.k_text)] - len(pools.k_text)
    n = len(live)
    z = normal(n, heads, form.rank, seed=seed + 1)
    rows.z[live] = (
        (40 * z).round().clamp(-127, 127).to(torch.int8) if form.has_residual else z.to(dtype)
    )
    if form.has_residual:
        residual = coded.quantise(0.7 * normal(n, heads, dim, seed=seed + 2), form.key_bits)
        rows.residual[live], rows.residual_steps[live] = residual.packed, residual.steps
    updated = pools._replace(
        z=rows.z, v_visual=rows.values, residual=rows.residual, steps=rows.steps,
        query_map=nans(NUM_BASES, heads, dim, form.rank, dtype=dtype),
    )  # fmt: skip
    for basis in set(pools.slot_to_basis[live].tolist()):
        scale = (0.025 if form.has_residual else 1) * dim**-0.5
        updated.query_map[basis] = normal(heads, dim, form.rank, seed=seed + 100 + basis) * scale
    reference.store_values(updated, live, normal(n, heads, v_dim, seed=seed + 3))
    if fp8_text:
        scales = dict(k_scale=0.37, v_scale=1.7)
        texts = zip(
            ("k_text", "v_text"), (pools.k_text, pools.v_text), scales.values(), strict=True
        )
        updated = updated._replace(
            **{name: (x.float() / scale).to(FP8) for name, x, scale in texts}, **scales
        )
    batch.pools = updated
    return batch


def assert_same_rows(ours, theirs, form, rare=0.01):
    """Equal pools, but that few codes may be off by one where the kernel rounds a tie to the other
    side."""
    for name in ("k_text", "v_text", "z", "steps", "query_map", "mean"):
        a, b = getattr(ours, name), getattr(theirs, name)
        if a is not None and a.dtype != FP8:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        elif a is not None:
            assert_same_fp8(a, b)
    for name, bits in (("residual", form.key_bits), ("v_visual", form.value_bits)):
        a, b = getattr(ours, name), getattr(theirs, name)
        if a is not None and a.dtype == torch.uint8:
            off = (coded.unpack(a, bits).int() - coded.unpack(b, bits).int()).abs()
            assert off.max() <= 1 and (off > 0).float().mean() <= rare
        elif a is not None and a.dtype == FP8:
            assert_same_fp8(a, b)
        elif a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_same_fp8(a, b):
    if DEVICE == "cuda":  # torch multiplies by 1 / scale there
        off = (a.view(torch.uint8).int() - b.view(torch.uint8).int()).abs()
        assert off.max() <= 1 and (off > 0).float().mean() < 0.01
    else:
        # The interpreter rounds small numbers towards 0, and drops the carry of those below a power
        # of two.
        assert torch.equal(a.float().isnan(), b.float().isnan())
        is_close = torch.isclose(a.float(), b.float(), rtol=0.13, atol=2e-3, equal_nan=True)
        assert is_close.float().mean() > 0.96


# --- store ----------------------------------------------------------------------------------------


# Pairs, not all combinations: the interpreter takes its time.
STORED = {
    "16+h4-v4-d64": ("16+h4-v4", Shape(2, 3, 64, 64, 16), False, torch.int64),
    "16+h4-v8-d80-v96-fp8-text": ("16+h4-v8", Shape(3, 1, 80, 96, 16), True, torch.int32),
    "8+h4-v2-d80-v96": ("8+h4-v2", Shape(3, 1, 80, 96, 16), False, torch.int32),
    "r32-v4-d128-fp8-text": ("r32-v4", Shape(1, 7, 128, 128, 16), True, torch.int64),
    "16+h4-v16-fp8-text": ("16+h4-v16", Shape(2, 3, 64, 64, 16), True, torch.int32),
}


@pytest.mark.parametrize(("name", "shape", "fp8_text", "index_dtype"), STORED.values(), ids=STORED)
def test_store_writes_the_rows_of_its_reference_in_their_format(name, shape, fp8_text, index_dtype):
    form, dtype = FORMATS[name], HALF if index_dtype == torch.int32 else DTYPES[0]
    prefix = [(TEXT, 5), (0, 4), (TEXT, 3), (2, 6)]
    ours, theirs = (
        with_format(make_batch([prefix], shape, dtype), form, dtype, fp8_text) for _ in range(2)
    )
    _, k, v = make_qkv(len(ours.kv_indices), shape, dtype)
    # Beyond FP8; a Value without a span.
    k[0, 0, :2], v[5], v[6, :, 3] = (torch.tensor([1e4, -1e4]).to(k), 0.5, -0.0)
    workspaces = [nans(12, *k.shape[1:], dtype=dtype) for _ in range(2)]
    workspace_rows = (ours.kv_indices >= len(ours.pools.k_text)).cumsum(0) - 1 + 2
    for write, batch, workspace in zip(
        (store, reference.store), (ours, theirs), workspaces, strict=True
    ):
        write(k, v, ours.kv_indices.to(index_dtype), batch.pools, workspace, workspace_rows)
    assert_same_rows(ours.pools, theirs.pools, form)
    torch.testing.assert_close(*workspaces, rtol=0, atol=0, equal_nan=True)


# --- encode ---------------------------------------------------------------------------------------

ENCODED = {
    "d64-16+h4": (2, 64, RowFormat(16, 4, 4), [1, 2, 17, 200], DTYPES[0]),
    "d80-8+h2": (1, 80, RowFormat(8, 2, 4), [3, 129], DTYPES[0]),
    "d96-16+h4-v8": (1, 96, RowFormat(16, 4, 8), [65], HALF),
    "d128-16+h2": (1, 128, RowFormat(16, 2, 4), [140, 63], DTYPES[0]),
}


def run_encode(keys, lens, form, errors=None):
    """Encode segments of ``lens`` of keys [L, n, H, D] into rows and bases that are NaN or 255
    before.
    -> CompressedPools, rows [n], segments."""
    layers, n, heads, dim = keys.shape
    memory = torch.full(
        (layers, (n + 9) * heads * form.row_bytes(dim, dim, keys.element_size())),
        255,
        dtype=torch.uint8,
    )
    rows = VisualRows.view(memory.to(DEVICE), form, heads, dim, dim, keys.dtype)
    query_map, mean = (
        nans(layers, len(lens) + 2, heads, dim, form.rank, dtype=keys.dtype),
        nans(layers, len(lens) + 2, heads, dim),
    )
    pools = CompressedPools(rows.z, query_map, mean, 107, rows.residual, rows.steps)
    bounds = test_kernels.indptr(lens).tolist()
    segments = [(*bound, len(lens) - i) for i, bound in enumerate(pairwise(bounds))]
    order = torch.randperm(n + 9, generator=torch.Generator().manual_seed(0))[:n].to(DEVICE)
    start = compress.start_vectors(dim, form.rank, DEVICE)
    uploaded = compress.Segments.upload(segments, DEVICE)
    compress.compress(keys, (order + 107).int(), uploaded, pools, start, errors=errors)
    untouched = [row for row in range(n + 9) if row not in order.tolist()]
    assert (rows.residual[:, untouched] == 255).all() and (rows.steps[:, untouched] == 255).all()
    assert not query_map[:, 0].isfinite().any() and (rows.z[:, untouched] == -1).all()
    assert form.value_bits > 4 or (rows.value_steps == 255).all()
    return pools, order, segments


@pytest.mark.parametrize(("heads", "dim", "form", "lens", "dtype"), ENCODED.values(), ids=ENCODED)
def test_encode_equals_its_reference_with_the_same_principal_components(
    heads, dim, form, lens, dtype
):
    keys = test_kernels.make_keys(sum(lens), heads, dim, dtype, "exp-20", offset=2.0, layers=2)
    errors = nans(2, len(lens), heads, 2)
    pools, order, segments = run_encode(keys, lens, form, errors)
    for layer in range(2):
        for i, (first, end, basis_id) in enumerate(segments):
            own, rows = keys[layer, first:end].float(), order[first:end]
            basis = Basis(
                None, pools.query_map[layer, basis_id].float(), pools.mean[layer, basis_id]
            )
            length = basis.query_map.norm(dim=1, keepdim=True)
            basis = basis._replace(key_map=basis.query_map / length.square())
            z, packed, steps = (
                pools.z[layer, rows],
                pools.residual[layer, rows],
                pools.steps[layer, rows, :, :4],
            )
            exact = torch.einsum("nhd,hda->nha", own - basis.mean, basis.key_map)
            # Directions of rounding errors aside; the map is rounded to its dtype.
            is_real = (length > 1e-3 * length.amax((0, 2), keepdim=True)) & (end - first > 1)
            off = torch.where(is_real[:, 0], (z - exact).abs(), 0.0)
            # A rounded direction leans half an eps towards the longest, whose coordinate is 127 at
            # most.
            eps = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
            lean = 64 * eps * (length.amax((0, 2), keepdim=True) / length)[:, 0]
            assert (off <= 0.5 + 1e-3 + torch.where(is_real[:, 0], lean, 0)).all()
            assert (z.abs().amax(0) >= 126).all() or end - first < form.rank
            turn = coded.hadamard(dim, DEVICE)
            left = (
                own - basis.mean - torch.einsum("nha,hda->nhd", z.float(), basis.query_map)
            ) @ turn
            expected = coded.quantise(left, form.key_bits, searches=True)
            got, theirs = (
                coded.dequantise(c, form.key_bits) for c in (coded.Codes(packed, steps), expected)
            )
            # Where two shares of the range are as good, rounding decides, and all codes of a half
            # differ.
            same = (steps == expected.steps).all(-1)
            assert same.float().mean() > 0.9 or end - first < 20
            off = (
                coded.unpack(packed, form.key_bits).int()
                - coded.unpack(expected.packed, form.key_bits).int()
            )
            if end - first > 2:  # of one or two Keys the residual is rounding errors
                assert off[same].abs().max() <= 1 and (off[same] != 0).float().mean() < 0.01
            error, least = ((x - left).square().sum(-1) for x in (got, theirs))
            assert (error[same] <= least[same] * 1.01 + 1e-6).all()
            assert error.sum() <= least.sum() * 1.01 + 1e-6
            energy = (own - basis.mean).square().sum((0, 2))
            whole = torch.where(energy > 0, energy, 1.0)
            stated = torch.stack([coded.residual_energy(own, basis), error.sum(0) / whole], -1)
            assert torch.allclose(
                errors[layer, i], stated, rtol=1e-2, atol=1e-3 if dtype == torch.bfloat16 else 2e-4
            )
    # The basis captures what the best one of this rank does.
    longest = max(range(len(lens)), key=lambda i: lens[i])
    first, end, _ = segments[longest]
    best = pca.fit_coded(keys[0, first:end], None, form.rank)
    assert (
        errors[0, longest, :, 0] <= coded.residual_energy(keys[0, first:end], best) * 1.05 + 1e-3
    ).all()


def test_encode_in_little_scratch_gives_the_same_bits(monkeypatch):
    lens = [140, 3, 64]
    keys = test_kernels.make_keys(sum(lens), 1, 64, HALF, layers=2)
    whole_errors, errors = nans(2, 3, 1, 2), nans(2, 3, 1, 2)
    whole = run_encode(keys, lens, RowFormat(), whole_errors)[0]
    monkeypatch.setattr(compress, "SCRATCH_BYTES", 45_000)
    bound, work = (
        compress.scratch_bytes(max(lens), 1, 64, 16, keys.element_size(), is_coded=True),
        compress._compress,
    )

    def bounded(*arguments):
        scratch = work(*arguments)
        assert 4 * len(scratch) <= bound
        return scratch

    monkeypatch.setattr(compress, "_compress", bounded)
    parts = run_encode(keys, lens, RowFormat(), errors)[0]
    for a, b in zip(
        [*whole[:3], *whole[4:], whole_errors], [*parts[:3], *parts[4:], errors], strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# --- attention ------------------------------------------------------------------------------------

# head_dim, v_head_dim and group of each with format, text and dtype: pairs.
ATTENDED = {
    "16+h4-v4": ("16+h4-v4", Shape(2, 4, 128, 128, 0), False, HALF),
    "16+h4-v4-fp8-text": ("16+h4-v4", Shape(1, 7, 64, 64, 0), True, DTYPES[0]),
    "16+h2-v4": ("16+h2-v4", Shape(2, 1, 96, 96, 0), False, DTYPES[0]),
    "8+h4-v2": ("8+h4-v2", Shape(1, 8, 80, 64, 0), False, HALF),
    "16+h2-v2-fp8-text": ("16+h2-v2", Shape(2, 4, 80, 80, 0), True, HALF),
    "16+h4-v8-fp8-text": ("16+h4-v8", Shape(1, 7, 96, 96, 0), True, HALF),
    "16+h4-v16": ("16+h4-v16", Shape(1, 4, 64, 96, 0), False, DTYPES[0]),
    "r32-v8": ("r32-v8", Shape(1, 4, 128, 128, 0), False, HALF),
    "r32-v4": ("r32-v4", Shape(2, 1, 64, 80, 0), False, HALF),
    "r16-v2-fp8-text": ("r16-v2", Shape(1, 7, 128, 64, 0), True, DTYPES[0]),
    "r16-v16-fp8-text": ("r16-v16", Shape(2, 4, 64, 64, 0), True, DTYPES[0]),
}
attended = pytest.mark.parametrize(
    ("name", "shape", "fp8_text", "dtype"), ATTENDED.values(), ids=ATTENDED
)
# Odd lengths, no images, nothing but images, several runs; decode cuts the longest into splits.
ODD_LENGTHS = [
    [],
    [(TEXT, 17)],
    [(0, 1)],
    [(2, 63)],
    [(TEXT, 65), (1, 900), (TEXT, 1), (3, 17), (0, 65)],
]
ODD_EXTENDS = [2, 1, 17, 3, 9]


def coded_batch(prefixes, name, shape, fp8_text, dtype):
    shape = shape._replace(rank=FORMATS[name].rank)
    return with_format(make_batch(prefixes, shape, dtype), FORMATS[name], dtype, fp8_text)


def check_coded_decode(batch, dtype, num_sms=132, logit_cap=0.0):
    shape, bs = batch.shape, len(batch.kv_lens)
    plan = test_kernels.decode_plan(batch, num_sms)
    q = make_qkv(bs, shape, dtype)[0]
    out = nans(bs, shape.num_heads, shape.v_head_dim, dtype=dtype)
    decode.update_plan(plan, *batch.requests)
    decode.decode(
        q, batch.pools, plan, test_kernels.indptr([1] * bs), shape.sm_scale, logit_cap, out=out
    )
    expected = reference.decode(
        q.float(), batch.pools, batch.kv_indptr, batch.kv_indices, shape.sm_scale, logit_cap
    )
    # Steps weigh the softmax before it is rounded, and codes have an offset.
    assert_rows_close(out, expected, dtype, times=2)
    return plan


@attended
def test_decode_over_rows_of_every_format_equals_its_reference(name, shape, fp8_text, dtype):
    batch = coded_batch(ODD_LENGTHS, name, shape, fp8_text, dtype)
    plan = check_coded_decode(batch, dtype)
    assert plan.num_splits.max() > 1
    check_coded_decode(batch, dtype, num_sms=1, logit_cap=5.0)


def check_coded_extend(batch, dtype, splits, logit_cap=0.0):
    shape = batch.shape
    q, k, v = make_qkv(sum(ODD_EXTENDS), shape, dtype)
    plan = extend.make_plan(
        batch.partition(), ODD_EXTENDS, shape.num_heads, batch.pools, 132 if splits else 1
    )
    extend.update_plan(plan, *batch.requests)
    assert plan.splits == splits or shape.group == 1
    own_out, own_lse = test_kernels.own_chunk(q, k, v, ODD_EXTENDS, shape.sm_scale, logit_cap)
    out, q_indptr, options = (
        own_out.to(dtype),
        test_kernels.indptr(ODD_EXTENDS),
        (shape.sm_scale, logit_cap),
    )
    extend.extend(q, out, own_lse, batch.pools, plan, q_indptr, *options)
    slots = batch.kv_indptr, batch.kv_indices
    expected = reference.extend(q.float(), k, v, batch.pools, q_indptr.tolist(), *slots, *options)
    assert_rows_close(out, expected, dtype, times=2)


@attended
def test_extend_over_rows_of_every_format_equals_its_reference(name, shape, fp8_text, dtype):
    batch = coded_batch(ODD_LENGTHS, name, shape, fp8_text, dtype)
    for splits, cap in ((True, 0.0), (False, 5.0)):
        check_coded_extend(batch, dtype, splits, cap)


@pytest.mark.parametrize("name", ["16+h4-v4-fp8-text", "16+h4-v4", "r32-v4"])
def test_extend_stored_over_coded_rows_equals_the_reference(name):
    name, shape, fp8_text, dtype = ATTENDED[name]
    batch = coded_batch(
        [[*p, (TEXT, n)] for p, n in zip(ODD_LENGTHS, ODD_EXTENDS, strict=True)],
        name,
        shape,
        fp8_text,
        dtype,
    )
    shape = batch.shape
    plan = extend.make_plan(batch.partition(), ODD_EXTENDS, shape.num_heads, batch.pools, 132)
    extend.update_plan(plan, *batch.requests)
    q, q_indptr = make_qkv(sum(ODD_EXTENDS), shape, dtype)[0], test_kernels.indptr(ODD_EXTENDS)
    out = extend.extend_stored(q, batch.pools, plan, q_indptr, shape.sm_scale)
    # The reference takes the new tokens' Keys and Values apart from the prefix, at full width.
    lens = [end - begin for begin, end in pairwise(batch.kv_indptr)]
    slots = list(zip(batch.kv_indices.split(lens), ODD_EXTENDS, strict=True))
    new, old = (
        torch.cat(x)
        for x in zip(*((row[len(row) - n :], row[: len(row) - n]) for row, n in slots), strict=True)
    )
    kv_indptr = test_kernels.indptr([len(row) - n for row, n in slots]).tolist()
    k, v = reference.expand(new, batch.pools)
    expected = reference.extend(
        q.float(), k, v, batch.pools, q_indptr.tolist(), kv_indptr, old, shape.sm_scale
    )
    assert_rows_close(out, expected, dtype, times=2)


# --- expand ---------------------------------------------------------------------------------------


@attended
def test_expand_of_rows_of_every_format_equals_its_reference(name, shape, fp8_text, dtype):
    batch = coded_batch(ODD_LENGTHS, name, shape, fp8_text, dtype)
    shape = batch.shape
    _, k, v = make_qkv(sum(ODD_EXTENDS), shape, dtype)
    totals = [int(prefix) + new for prefix, new in zip(batch.kv_lens, ODD_EXTENDS, strict=True)]
    q_indptr, kv_indptr = test_kernels.indptr(ODD_EXTENDS), test_kernels.indptr(totals)
    k_out = nans(sum(totals), shape.num_kv_heads, shape.head_dim, dtype=dtype)
    v_out = nans(sum(totals), shape.num_kv_heads, shape.v_head_dim, dtype=dtype)
    made = batch.partition()
    expand.expand(
        batch.pools, made, *batch.requests, q_indptr, kv_indptr, k, v, k_out, v_out, max(totals)
    )
    for i, (text, visual, _) in enumerate(batch.expected(batch.kv_lens)):
        own, of_request = slice(q_indptr[i], q_indptr[i + 1]), slice(kv_indptr[i], kv_indptr[i + 1])
        keys, values = reference.expand(
            torch.cat([text, visual + len(batch.pools.k_text)]), batch.pools
        )
        assert_rows_close(k_out[of_request], torch.cat([keys, k[own].float()]), dtype)
        assert_rows_close(v_out[of_request], torch.cat([values, v[own].float()]), dtype)


# --- from Keys to scores --------------------------------------------------------------------------


def test_an_outlier_bias_of_keys_costs_coded_rows_nothing_and_fp8_a_lot():
    """Keys of which three rotary pairs have a bias, 50 times their rms, through encode and decode:
    one-hot Values show the weights, and their logarithms the scores."""
    n, dim, group = 64, 64, 8
    keys = normal(1, n, 1, dim) * 0.93 ** torch.arange(dim, device=DEVICE)
    keys = torch.einsum("lnhd,de->lnhe", keys, torch.linalg.qr(normal(dim, dim, seed=1)).Q)
    rms = keys.square().mean().sqrt()
    angle = torch.arange(n, device=DEVICE)[:, None] * torch.tensor([1.0, 0.3, 0.07], device=DEVICE)
    biased = keys.clone()
    biased[0, :, 0, :3] += 50 * rms * torch.cos(angle)
    biased[0, :, 0, dim // 2 : dim // 2 + 3] += 50 * rms * torch.sin(angle)
    biased = biased.to(HALF)
    pools, order, _ = run_encode(biased, [n], RowFormat(16, 4, 16))
    q = normal(16, group, dim, seed=2).to(HALF)
    shape = Shape(1, group, dim, dim, 16)
    batch = with_format(make_batch([[(1, n)]] + [[]] * 15, shape, HALF), RowFormat(16, 4, 16), HALF)
    # All requests look at the one image.
    table = batch.req_to_token[batch.req_pool_indices[0]].clone()
    batch.req_to_token[batch.req_pool_indices] = table
    batch.kv_lens[:] = n
    rows = table[:n].long() - len(batch.pools.k_text)
    layer = batch.pools._replace(query_map=pools.query_map[0], mean=pools.mean[0])
    layer.z[rows], layer.residual[rows], layer.steps[rows] = (
        x[0, order] for x in (pools.z, pools.residual, pools.steps)
    )
    layer.v_visual[rows, 0] = torch.eye(n, device=DEVICE, dtype=HALF)
    batch.pools = layer
    plan = test_kernels.decode_plan(batch)
    decode.update_plan(plan, *batch.requests)
    out = nans(16, group, dim)
    # Small enough that every token keeps a weight to read its score from, large enough that the
    # weight's rounding does not show in it.
    scale = 0.3 if torch.bfloat16 == HALF else 0.05
    decode.decode(q, layer, plan, test_kernels.indptr([1] * 16), scale, out=out)

    def off(scores):
        error = scores - torch.einsum("mgd,nd->mgn", q.float(), biased[0, :, 0].float())
        error -= error.mean(-1, keepdim=True)  # softmax does not see it
        return (
            error.square().mean()
            / torch.einsum("mgd,nd->mgn", q.float(), keys[0, :, 0]).square().mean()
        ).sqrt()

    fp8 = torch.einsum("mgd,nd->mgn", q.float(), coded.to_fp8(biased[0, :, 0]).float())
    ours = off(out.float().log() / scale)
    assert ours <= 0.04 and off(fp8) > 4 * ours
