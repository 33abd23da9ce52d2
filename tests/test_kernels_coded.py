"""THE FORMAT HAS CHANGED, SEE FORMAT_CHANGED.md IN THE ROOT. Kernels over visual rows of every format and over FP8 text, against their plain-torch references.

How to run them: test_kernels.py. Triton's interpreter has no products of bf16, so that there it is fp16 and fp32.
"""

import pytest
import test_kernels
import torch
from test_kernels import (
    DEVICE,
    DTYPES,
    HALF,
    NAN,
    NUM_BASES,
    TEXT,
    Shape,
    assert_rows_close,
    dtypes,
    make_batch,
    make_qkv,
    nans,
    normal,
)

from sglang_rotatek.kernels import coded, reference
from sglang_rotatek.kernels.coded import FP8
from sglang_rotatek.kernels.reference import VisualRows
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
    """The batch over visual rows of ``form``, every other byte of which is 255: NaN, where it is a float."""
    pools, shape = batch.pools, batch.shape
    heads, dim, v_dim, num_rows = shape.num_kv_heads, shape.head_dim, shape.v_head_dim, len(pools.z)
    row_bytes = heads * form.row_bytes(dim, v_dim, dtype.itemsize)
    memory = torch.full((1, num_rows * row_bytes), 255, dtype=torch.uint8, device=DEVICE)
    rows = VisualRows(*(x if x is None else x[0] for x in VisualRows.view(memory, form, heads, dim, v_dim, dtype)))
    live = batch.kv_indices[batch.kv_indices >= len(pools.k_text)] - len(pools.k_text)
    n = len(live)
    z = normal(n, heads, form.rank, seed=seed + 1)
    rows.z[live] = (40 * z).round().clamp(-127, 127).to(torch.int8) if form.has_residual else z.to(dtype)
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
        texts = zip(("k_text", "v_text"), (pools.k_text, pools.v_text), scales.values())
        updated = updated._replace(**{name: (x.float() / scale).to(FP8) for name, x, scale in texts}, **scales)
    batch.pools = updated
    return batch


def assert_same_rows(ours, theirs, form, rare=0.01):
    """Equal pools, but that few codes may be off by one where the kernel rounds a tie to the other side."""
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
    if DEVICE == "cuda":
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    else:  # the interpreter rounds small numbers towards 0, and drops the carry of those below a power of two
        assert torch.equal(a.float().isnan(), b.float().isnan())
        is_close = torch.isclose(a.float(), b.float(), rtol=0.13, atol=2e-3, equal_nan=True)
        assert is_close.float().mean() > 0.96


# --- store ------------------------------------------------------------------------------------------------------


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
    ours, theirs = (with_format(make_batch([prefix], shape, dtype), form, dtype, fp8_text) for _ in range(2))
    _, k, v = make_qkv(len(ours.kv_indices), shape, dtype)
    k[0, 0, :2], v[5], v[6, :, 3] = torch.tensor([1e4, -1e4]).to(k), 0.5, -0.0  # beyond FP8; a Value without a span
    workspaces = [nans(12, *k.shape[1:], dtype=dtype) for _ in range(2)]
    workspace_rows = (ours.kv_indices >= len(ours.pools.k_text)).cumsum(0) - 1 + 2
    for write, batch, workspace in zip((store, reference.store), (ours, theirs), workspaces):
        write(k, v, ours.kv_indices.to(index_dtype), batch.pools, workspace, workspace_rows)
    assert_same_rows(ours.pools, theirs.pools, form)
    torch.testing.assert_close(*workspaces, rtol=0, atol=0, equal_nan=True)
