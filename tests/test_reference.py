"""The reference kernels against attention over reconstructed Keys, written out head by head in
fp64."""

from dataclasses import dataclass

import pytest
import torch

from sglang_rotatek.kernels import reference
from sglang_rotatek.kernels.pools import LayerPools

HEAD_DIM, RANK, NUM_BASES = 32, 16, 5
SM_SCALE = HEAD_DIM**-0.5

# The reference computes in fp32 whatever the storage; a bf16 result is rounded to 8 bits once.
TOLERANCES = {
    torch.float32: dict(rtol=1e-5, atol=1e-5),
    torch.bfloat16: dict(rtol=1e-2, atol=1e-2),
}
heads = pytest.mark.parametrize(("num_kv_heads", "group"), [(4, 1), (2, 3)], ids=["mha", "gqa"])
v_head_dims = pytest.mark.parametrize("v_head_dim", [HEAD_DIM, 24], ids=["dv32", "dv24"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])

TEXT = None  # the basis of a text token
# Requests as pieces (basis or TEXT, tokens); the names are the pytest ids.
PREFIXES = {
    "empty": [],
    "one-text-token": [(TEXT, 1)],
    "one-visual-token": [(0, 1)],
    "text-only-63": [(TEXT, 63)],
    "image-only-63": [(2, 63)],
    "chat-63": [(TEXT, 5), (0, 40), (TEXT, 18)],
    "chat-1000": [(TEXT, 20), (0, 300), (TEXT, 80), (1, 450), (TEXT, 150)],
    "image-in-three-segments": [(TEXT, 4), (0, 16), (1, 16), (2, 9), (TEXT, 3)],
    "image-shared-by-two-bases-in-turns": [(0, 3), (1, 2), (0, 4), (1, 5)],
    "prefix-cut-mid-image": [(TEXT, 6), (3, 7)],
}


@dataclass
class Pools:
    """Pools filled with NaN but for the tokens of ``prefixes``, and those tokens at full width."""

    layer: LayerPools
    kv_indptr: list
    kv_indices: torch.Tensor
    keys: list  # per request [n, H, D] fp64, visual ones rebuilt from z
    values: list  # per request [n, H, Dv] fp64


def make_pools(prefixes, num_kv_heads, v_head_dim=HEAD_DIM, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    pieces = [piece for prefix in prefixes for piece in prefix]
    used_bases = sorted({basis for basis, _ in pieces if basis is not TEXT})
    num_text = sum(n for basis, n in pieces if basis is TEXT)
    num_visual = sum(n for basis, n in pieces if basis is not TEXT)
    # Half as many rows again as are used, so that the permuted slots leave holes.
    text_slots, visual_slots = num_text + num_text // 2 + 2, num_visual + num_visual // 2 + 2
    free_text = (1 + torch.randperm(text_slots, generator=generator)).tolist()
    free_visual = (1 + text_slots + torch.randperm(visual_slots, generator=generator)).tolist()

    nan = float("nan")
    layer = LayerPools(
        k_text=torch.full((1 + text_slots, num_kv_heads, HEAD_DIM), nan, dtype=dtype),
        v_text=torch.full((1 + text_slots, num_kv_heads, v_head_dim), nan, dtype=dtype),
        z=torch.full((visual_slots, num_kv_heads, RANK), nan, dtype=dtype),
        v_visual=torch.full((visual_slots, num_kv_heads, v_head_dim), nan, dtype=dtype),
        query_map=torch.full((NUM_BASES, num_kv_heads, HEAD_DIM, RANK), nan, dtype=dtype),
        mean=torch.full((NUM_BASES, num_kv_heads, HEAD_DIM), nan),
        slot_to_basis=torch.full((visual_slots,), -1, dtype=torch.int32),
    )
    for basis in used_bases:
        layer.query_map[basis] = random(num_kv_heads, HEAD_DIM, RANK) * HEAD_DIM**-0.5
        layer.mean[basis] = random(num_kv_heads, HEAD_DIM).float() * 2

    kv_indptr, kv_indices, keys, values = [0], [], [], []
    for prefix in prefixes:
        request_keys = [torch.empty(0, num_kv_heads, HEAD_DIM, dtype=torch.float64)]
        request_values = [torch.empty(0, num_kv_heads, v_head_dim, dtype=torch.float64)]
        for basis, n in prefix:
            slots = [(free_text if basis is TEXT else free_visual).pop() for _ in range(n)]
            value = random(n, num_kv_heads, v_head_dim)
            if basis is TEXT:
                key = random(n, num_kv_heads, HEAD_DIM)
                layer.k_text[slots] = key
                layer.v_text[slots] = value
                key = key.double()
            else:
                rows = torch.tensor(slots) - (1 + text_slots)
                z = random(n, num_kv_heads, RANK)
                layer.z[rows] = z
                layer.v_visual[rows] = value
                layer.slot_to_basis[rows] = basis
                key = (
                    torch.einsum("nhr,hdr->nhd", z.double(), layer.query_map[basis].double())
                    + layer.mean[basis]
                )
            kv_indices += slots
            request_keys.append(key)
            request_values.append(value.double())
        kv_indptr.append(len(kv_indices))
        keys.append(torch.cat(request_keys))
        values.append(torch.cat(request_values))
    return Pools(layer, kv_indptr, torch.tensor(kv_indices, dtype=torch.int64), keys, values)


def dense_attention(q, keys, values, num_visible, logit_cap=0.0):
    """q [m, Hq, D], keys [n, H, D], values [n, H, Dv]; query i sees the first num_visible[i] keys.
    fp64."""
    group = q.shape[1] // keys.shape[1]
    out = torch.zeros(len(q), q.shape[1], values.shape[-1], dtype=torch.float64)
    for i, n in enumerate(num_visible):
        for head in range(q.shape[1] if n else 0):
            scores = keys[:n, head // group] @ q[i, head].double() * SM_SCALE
            if logit_cap:
                scores = logit_cap * (scores / logit_cap).tanh()
            weights = (scores - scores.max()).exp()
            out[i, head] = weights @ values[:n, head // group] / weights.sum()
    return out


def make_rows(n, num_heads, width, dtype, seed):
    return torch.randn(n, num_heads, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_decode(
    prefixes, num_kv_heads=2, group=3, v_head_dim=HEAD_DIM, dtype=torch.float32, logit_cap=0.0
):
    pools = make_pools(prefixes, num_kv_heads, v_head_dim, dtype)
    q = make_rows(len(prefixes), num_kv_heads * group, HEAD_DIM, dtype, seed=1)
    out = reference.decode(q, pools.layer, pools.kv_indptr, pools.kv_indices, SM_SCALE, logit_cap)
    requests = enumerate(zip(pools.keys, pools.values, strict=True))
    expected = torch.cat(
        [dense_attention(q[i : i + 1], k, v, [len(k)], logit_cap) for i, (k, v) in requests]
    )
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, **TOLERANCES[dtype])


def check_extend(
    prefixes,
    own_lens,
    num_kv_heads=2,
    group=3,
    v_head_dim=HEAD_DIM,
    dtype=torch.float32,
    logit_cap=0.0,
):
    pools = make_pools(prefixes, num_kv_heads, v_head_dim, dtype)
    total = sum(own_lens)
    q = make_rows(total, num_kv_heads * group, HEAD_DIM, dtype, seed=1)
    k = make_rows(total, num_kv_heads, HEAD_DIM, dtype, seed=2)
    v = make_rows(total, num_kv_heads, v_head_dim, dtype, seed=3)
    extend_indptr = [sum(own_lens[:i]) for i in range(len(own_lens) + 1)]
    out = reference.extend(
        q, k, v, pools.layer, extend_indptr, pools.kv_indptr, pools.kv_indices, SM_SCALE, logit_cap
    )
    expected = []
    for i, (prefix_keys, prefix_values) in enumerate(zip(pools.keys, pools.values, strict=True)):
        rows = slice(extend_indptr[i], extend_indptr[i + 1])
        keys = torch.cat([prefix_keys, k[rows].double()])
        values = torch.cat([prefix_values, v[rows].double()])
        visible = [len(prefix_keys) + j + 1 for j in range(own_lens[i])]
        expected.append(dense_attention(q[rows], keys, values, visible, logit_cap))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), torch.cat(expected), **TOLERANCES[dtype])


@heads
@v_head_dims
@dtypes
@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES)
def test_decode_equals_dense_attention_over_reconstructed_keys(
    prefix, num_kv_heads, group, v_head_dim, dtype
):
    check_decode([prefix], num_kv_heads, group, v_head_dim, dtype)


@heads
@v_head_dims
@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES)
@pytest.mark.parametrize("own_tokens", [1, 17])
def test_extend_equals_dense_attention_over_reconstructed_keys(
    prefix, own_tokens, num_kv_heads, group, v_head_dim
):
    check_extend([prefix], [own_tokens], num_kv_heads, group, v_head_dim)


@dtypes
def test_a_decode_batch_of_every_kind_of_request(dtype):
    check_decode(list(PREFIXES.values()), dtype=dtype)


@dtypes
def test_an_extend_batch_of_every_kind_of_request(dtype):
    prefixes = list(PREFIXES.values())
    check_extend(prefixes, [1 + 5 * i % 13 for i in range(len(prefixes))], dtype=dtype)


@pytest.mark.parametrize("logit_cap", [1.5, 30.0])
def test_the_logit_cap_holds_for_text_visual_and_own_scores(logit_cap):
    prefixes = [PREFIXES["chat-63"], PREFIXES["image-only-63"]]
    check_decode(prefixes, logit_cap=logit_cap)
    check_extend(prefixes, [4, 9], logit_cap=logit_cap)


def test_a_chunk_of_1000_tokens_after_nothing_is_plain_causal_attention():
    check_extend([[]], [1000], num_kv_heads=1, group=2)


def test_a_request_without_new_tokens_takes_no_rows():
    check_extend([PREFIXES["chat-63"], PREFIXES["text-only-63"]], [0, 3])


def test_decode_without_any_slot_gives_zeros():
    pools = make_pools([[], [(TEXT, 3)]], num_kv_heads=2)
    q = make_rows(2, 4, HEAD_DIM, torch.float32, seed=1)
    out = reference.decode(q, pools.layer, pools.kv_indptr, pools.kv_indices, SM_SCALE)
    assert torch.equal(out[0], torch.zeros(4, HEAD_DIM))
    assert out[1].abs().sum() > 0


def test_slot_scores_do_not_depend_on_the_order_of_slots():
    pools = make_pools([PREFIXES["chat-63"]], num_kv_heads=2)
    q = make_rows(3, 6, HEAD_DIM, torch.float32, seed=1).unflatten(1, (2, 3))
    order = torch.randperm(63, generator=torch.Generator().manual_seed(4))
    scores = reference.slot_scores(q, pools.kv_indices, pools.layer)
    shuffled = reference.slot_scores(q, pools.kv_indices[order], pools.layer)
    torch.testing.assert_close(shuffled, scores[..., order], **TOLERANCES[torch.float32])


def test_int32_slots_are_accepted():
    pools = make_pools([PREFIXES["chat-63"]], num_kv_heads=2)
    q = make_rows(1, 6, HEAD_DIM, torch.float32, seed=1)
    wide = reference.decode(q, pools.layer, pools.kv_indptr, pools.kv_indices, SM_SCALE)
    narrow = reference.decode(q, pools.layer, pools.kv_indptr, pools.kv_indices.int(), SM_SCALE)
    assert torch.equal(wide, narrow)


@dtypes
def test_compress_projects_the_centred_keys(dtype):
    keys = make_rows(9, 2, HEAD_DIM, dtype, seed=1)
    key_map = make_rows(2, HEAD_DIM, RANK, torch.float32, seed=2)
    mean = make_rows(1, 2, HEAD_DIM, torch.float32, seed=3)[0]
    z = reference.compress(keys, key_map, mean)
    assert z.dtype == torch.float32
    for token in range(9):
        for head in range(2):
            expected = key_map[head].double().T @ (keys[token, head].double() - mean[head].double())
            torch.testing.assert_close(
                z[token, head].double(), expected, **TOLERANCES[torch.float32]
            )
