import pytest
import torch

from sglang_rotatek.basis import QUERY_WINDOW, get_basis

NUM_KV_HEADS, GROUP, HEAD_DIM = 2, 3, 64

TOLERANCES = {
    # fp32 sums over 64 channels of numbers near 10.
    "score": dict(rtol=1e-4, atol=1e-4),
    # fp32 orthogonality of 64-vectors after Cholesky-QR or eigh.
    "orthonormal": dict(rtol=0, atol=1e-5),
    # fp32 eigen-solve against fp64.
    "energy": dict(rtol=1e-5, atol=0),
}
# Five steps of subspace iteration need not converge, and need not: the energy is what counts.
PAPER_ENERGY_SHARE = 0.99


def make_keys(n, seed=0, dtype=torch.float32):
    """[n, H, D] with a decaying spectrum in random directions and large means in a few channels."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(NUM_KV_HEADS, HEAD_DIM, HEAD_DIM, generator=generator)).Q
    spread = torch.linspace(0, -3, HEAD_DIM).exp()
    keys = torch.einsum(
        "nhd,hde->nhe", torch.randn(n, NUM_KV_HEADS, HEAD_DIM, generator=generator) * spread, turn
    )
    mean = torch.randn(NUM_KV_HEADS, HEAD_DIM, generator=generator)
    mean[:, ::16] *= 20
    return (keys + mean).to(dtype)


def make_queries(n=QUERY_WINDOW, seed=1, dtype=torch.float32):
    """[n, Hq, D] whose channels differ in size by two orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.logspace(-1, 1, HEAD_DIM)[torch.randperm(HEAD_DIM, generator=generator)]
    return (torch.randn(n, NUM_KV_HEADS * GROUP, HEAD_DIM, generator=generator) * size).to(dtype)


def exact_scores(queries, keys):
    """[n queries, H, G, n keys] in fp64."""
    queries = queries.double().unflatten(1, (NUM_KV_HEADS, GROUP))
    return torch.einsum("mhgd,nhd->mhgn", queries, keys.double())


def rotated_scores(queries, keys, basis):
    """The formula of the method, in fp64: (P_q^T q) . z + q . mean with z = P_k^T (k - mean)."""
    key_map, query_map, mean = (part.double() for part in basis)
    queries = queries.double().unflatten(1, (NUM_KV_HEADS, GROUP))
    z = torch.einsum("nhd,hdr->nhr", keys.double() - mean, key_map)
    rotated = torch.einsum("mhgd,hdr->mhgr", queries, query_map)
    return (
        torch.einsum("mhgr,nhr->mhgn", rotated, z)
        + torch.einsum("mhgd,hd->mhg", queries, mean)[..., None]
    )


def covariance(keys):
    centred = (keys.double() - keys.double().mean(dim=0)).transpose(0, 1)
    return centred.mT @ centred


def captured(matrix, vectors):
    """Energy of ``matrix`` [H, D, D] within the orthonormal ``vectors`` [H, D, r], per head."""
    return (vectors.double().mT @ matrix @ vectors.double()).diagonal(dim1=1, dim2=2).sum(-1)


def most_capturable(matrix, rank):
    return torch.linalg.eigvalsh(matrix)[:, -rank:].sum(-1)


def weighted_covariance(keys, queries):
    """W C W of the paper, from its definition, in fp64."""
    group_mean = queries.double().unflatten(1, (NUM_KV_HEADS, GROUP)).mean(dim=2)
    weight = group_mean.square().sum(dim=0).sqrt()
    weight = torch.maximum(weight, 1e-3 * weight.median(dim=-1, keepdim=True).values)
    return weight[:, :, None] * covariance(keys) * weight[:, None, :]


def assert_orthonormal(vectors):
    eye = torch.eye(vectors.shape[-1]).expand(len(vectors), -1, -1)
    torch.testing.assert_close(vectors.mT @ vectors, eye, **TOLERANCES["orthonormal"])


every_basis = pytest.mark.parametrize("name", ["pca", "paper", "think"])


@every_basis
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_basis_is_fp32_and_has_the_documented_shapes(name, dtype):
    basis = get_basis(name)(make_keys(100, dtype=dtype), make_queries(dtype=dtype), 16)
    assert basis.key_map.shape == basis.query_map.shape == (NUM_KV_HEADS, HEAD_DIM, 16)
    assert basis.mean.shape == (NUM_KV_HEADS, HEAD_DIM)
    assert {part.dtype for part in basis} == {torch.float32}
    assert all(part.is_contiguous() for part in (basis.key_map, basis.query_map))


@every_basis
def test_bf16_keys_give_the_basis_of_the_same_numbers_in_fp32(name):
    keys, queries = make_keys(100, dtype=torch.bfloat16), make_queries(dtype=torch.bfloat16)
    narrow, wide = (
        get_basis(name)(keys, queries, 16),
        get_basis(name)(keys.float(), queries.float(), 16),
    )
    for a, b in zip(narrow, wide, strict=True):
        assert torch.equal(a, b)


@every_basis
def test_full_rank_reproduces_every_score(name):
    keys, queries = make_keys(200), make_queries()
    basis = get_basis(name)(keys, queries, HEAD_DIM)
    torch.testing.assert_close(
        rotated_scores(queries, keys, basis), exact_scores(queries, keys), **TOLERANCES["score"]
    )


@every_basis
@pytest.mark.parametrize("n", [1, 2, 15])
def test_a_segment_shorter_than_the_rank_gives_finite_parts(name, n):
    basis = get_basis(name)(make_keys(n), make_queries(), 16)
    assert all(part.isfinite().all() for part in basis)


@every_basis
@pytest.mark.parametrize("value", [0.0, 3.0, -1000.0])
def test_constant_keys_keep_their_scores(name, value):
    keys, queries = torch.full((50, NUM_KV_HEADS, HEAD_DIM), value), make_queries()
    basis = get_basis(name)(keys, queries, 16)
    assert all(part.isfinite().all() for part in basis)
    if name != "think":  # it has no mean term
        scores = rotated_scores(queries, keys, basis)
        torch.testing.assert_close(scores, exact_scores(queries, keys), **TOLERANCES["score"])


@every_basis
def test_queries_of_zero_give_finite_parts(name):
    basis = get_basis(name)(make_keys(50), torch.zeros_like(make_queries()), 16)
    assert all(part.isfinite().all() for part in basis)


@every_basis
def test_a_fit_is_deterministic(name):
    fits = [get_basis(name)(make_keys(50), make_queries(), 16) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*fits, strict=True))


@every_basis
def test_a_window_shorter_than_the_full_one_is_enough(name):
    basis = get_basis(name)(make_keys(50), make_queries(n=1), 16)
    assert all(part.isfinite().all() for part in basis)


def test_an_unknown_basis_is_a_key_error():
    with pytest.raises(KeyError):
        get_basis("svd")


@pytest.mark.parametrize("rank", [1, 16, 48])
def test_pca_captures_all_the_energy_that_rank_directions_can(rank):
    keys = make_keys(300)
    basis = get_basis("pca")(keys, None, rank)
    assert_orthonormal(basis.key_map)
    matrix = covariance(keys)
    torch.testing.assert_close(
        captured(matrix, basis.key_map), most_capturable(matrix, rank), **TOLERANCES["energy"]
    )


def test_pca_scores_are_those_of_the_projected_keys():
    keys, queries = make_keys(300), make_queries()
    basis = get_basis("pca")(keys, None, 16)
    mean = keys.double().mean(dim=0)
    _, vectors = torch.linalg.eigh(covariance(keys))
    top = vectors[:, :, -16:]
    projected = mean + torch.einsum("nhd,hdr,her->nhe", keys.double() - mean, top, top)
    torch.testing.assert_close(
        rotated_scores(queries, keys, basis),
        exact_scores(queries, projected),
        **TOLERANCES["score"],
    )


@pytest.mark.parametrize("n", [1, 2, 16])
def test_pca_loses_nothing_of_a_segment_no_longer_than_the_rank(n):
    keys, queries = make_keys(n), make_queries()
    basis = get_basis("pca")(keys, None, 16)
    torch.testing.assert_close(
        rotated_scores(queries, keys, basis), exact_scores(queries, keys), **TOLERANCES["score"]
    )


def test_the_mean_of_pca_and_paper_is_that_of_the_keys():
    keys, queries = make_keys(300), make_queries()
    expected = keys.double().mean(dim=0)
    for name in ("pca", "paper"):
        mean = get_basis(name)(keys, queries, 16).mean
        torch.testing.assert_close(mean.double(), expected, **TOLERANCES["score"])


@pytest.mark.parametrize("rank", [1, 16, 48, 64])
@pytest.mark.parametrize("n", [8, 300])
def test_paper_columns_are_orthonormal(rank, n):
    basis = get_basis("paper")(make_keys(n), make_queries(), rank)
    assert_orthonormal(basis.key_map)
    assert torch.equal(basis.key_map, basis.query_map)


@pytest.mark.parametrize("rank", [16, 48])
def test_paper_captures_nearly_the_weighted_energy_that_rank_directions_can(rank):
    keys, queries = make_keys(300), make_queries()
    basis = get_basis("paper")(keys, queries, rank)
    matrix = weighted_covariance(keys, queries)
    share = captured(matrix, basis.key_map) / most_capturable(matrix, rank)
    assert (share > PAPER_ENERGY_SHARE).all()
    assert (share <= 1 + TOLERANCES["energy"]["rtol"]).all()


def test_paper_looks_where_the_queries_look():
    keys, queries = make_keys(300), make_queries()
    blind = queries.clone()
    blind[..., : HEAD_DIM // 2] = 0
    basis = get_basis("paper")(keys, blind, 16)
    energy = basis.query_map.square().sum(dim=-1)
    assert (energy[:, : HEAD_DIM // 2].sum(-1) < 1e-2 * energy[:, HEAD_DIM // 2 :].sum(-1)).all()


def test_think_keeps_the_channels_with_the_largest_product_of_mean_squares():
    keys, queries = make_keys(300), make_queries()
    basis = get_basis("think")(keys, queries, 16)
    assert torch.equal(basis.mean, torch.zeros(NUM_KV_HEADS, HEAD_DIM))
    assert torch.equal(basis.key_map, basis.query_map)
    for head in range(NUM_KV_HEADS):
        own = queries[:, head * GROUP : (head + 1) * GROUP].double()
        score = own.square().mean(dim=(0, 1)) * keys[:, head].double().square().mean(dim=0)
        expected = set(score.argsort(descending=True)[:16].tolist())
        columns = basis.key_map[head]
        assert set(columns.argmax(dim=0).tolist()) == expected
        assert torch.equal(columns.sum(dim=0), torch.ones(16))
        assert columns.count_nonzero() == 16
