"""The kernels of divprune, pick by pick, and of visionzip against plain torch; and what selectors
do on a GPU.

How to run them: test_kernels.py.
"""

import pytest
import test_kernels
import torch
from test_kernels import DEVICE, NAN, only_on_a_gpu

from sglang_rotatek.kernels import divprune, pruning_reference, received
from sglang_rotatek.pruning import visionzip
from sglang_rotatek.pruning.selectors import SELECTORS

pytestmark = test_kernels.pytestmark
scratch_holds_garbage = test_kernels.scratch_holds_garbage

N = 133
GROUPS = {
    "one-token": [(0, 1, 1)],
    "one-pick": [(0, 37, 1)],
    "two-picks": [(0, 37, 2)],
    "all": [(0, 37, 37)],
    "multiple-of-32": [(0, 64, 20)],
    "odd": [(0, N, 47)],
    "tiles": [(0, 55, 20), (55, 109, 19), (109, N, 8)],
    "gaps": [(3, 8, 5), (40, 41, 1), (60, 120, 30)],
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
groups = pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
dtypes = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def tokens(n=N, hidden=40):
    return torch.randn(n, hidden, generator=torch.Generator().manual_seed(0))


def blank_paper(n=N):
    """Equal tokens, a few others, and zero vectors."""
    x = tokens(n)
    x[20:110] = x[5]
    x[60], x[120:123] = 0, 0
    return x


def assert_same_picks(x, groups):
    chosen, expected = divprune.divprune(x, groups), pruning_reference.divprune(x, groups)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == expected.tolist()
    for part, (first, end, _) in zip(chosen.split([k for *_, k in groups]), groups, strict=True):
        assert first <= part[0] and part[-1] < end and (part.diff() > 0).all()


@groups
@dtypes
def test_kernel_picks_what_the_reference_picks(groups, dtype):
    assert_same_picks(tokens().to(DEVICE, dtype), groups)


@groups
def test_equal_tokens_and_zero_vectors_are_picked_in_the_same_order(groups):
    assert_same_picks(blank_paper().to(DEVICE, torch.bfloat16), groups)


def test_nan_and_infinite_tokens_are_picked_once_at_most():
    x = tokens()
    x[7], x[50, 3], x[100] = NAN, float("inf"), 3e38
    for k in (40, N - 1, N):
        assert_same_picks(x.to(DEVICE), [(0, N, k)])


def test_features_may_be_columns_of_a_wider_tensor():
    assert_same_picks(tokens(hidden=48).to(DEVICE)[:, 3:41], GROUPS["tiles"])


@pytest.mark.parametrize("group", [(0, N + 1, 5), (-1, 3, 1), (5, 5, 1), (5, 9, 5), (5, 9, 0)])
def test_bad_groups_are_refused(group):
    with pytest.raises(
        ValueError, match=r"groups must be ascending \(first, end, k\) within 133 tokens.*got \("
    ):
        divprune.divprune(tokens().to(DEVICE), [group])
    with pytest.raises(ValueError, match=r"got \(70, 80, 2\) after token 77"):
        divprune.divprune(tokens().to(DEVICE), [(0, 77, 5), (70, 80, 2)])


@only_on_a_gpu
@pytest.mark.parametrize("size", [(1225, 3584), (2928, 4096)], ids=["1225", "2928"])
def test_kernel_picks_what_the_reference_picks_of_whole_images(size):
    x = tokens(*size).to(DEVICE, torch.bfloat16)
    n = len(x)
    assert_same_picks(x, [(0, n, n * 35 // 100)])
    tiles = [(first, min(first + 576, n)) for first in range(0, n, 576)]
    assert_same_picks(x, [(first, end, min(64, end - first)) for first, end in tiles])


@only_on_a_gpu
@pytest.mark.parametrize("name", SELECTORS)
def test_selectors_do_not_wait_for_the_gpu(name):
    x = blank_paper().to(DEVICE, torch.bfloat16)
    first = SELECTORS[name](x, 100)  # compiles, and makes the libraries' handles
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = SELECTORS[name](x, 100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)


@only_on_a_gpu
@pytest.mark.parametrize("name", SELECTORS)
def test_selectors_keep_on_a_gpu_what_they_keep_on_a_cpu(name):
    """Rounding may swap near ties."""
    x = (tokens(400, 64) @ torch.diag(0.8 ** torch.arange(64))).bfloat16()
    on_cpu, on_gpu = SELECTORS[name](x, 140).tolist(), SELECTORS[name](x.to(DEVICE), 140).tolist()
    assert len(set(on_cpu) & set(on_gpu)) >= 133


@pytest.mark.parametrize("dtype", test_kernels.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 1, 16), (129, 2, 72), (200, 3, 80), (333, 2, 128)], ids=str)
def test_what_tokens_receive_is_the_column_sum_of_all_weights(shape, dtype):
    """Of views into rows of queries, keys and values, as towers pass them."""
    num_tokens, num_heads, head_dim = shape
    drawn = torch.randn(
        num_tokens, 3, num_heads, head_dim, generator=torch.Generator().manual_seed(1)
    )
    q, k, _ = drawn.to(DEVICE, dtype).unbind(1)
    expected = visionzip.attention_received(q.float(), k.float())
    found = received.attention_received(q, k)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert found.sum().item() == pytest.approx(num_tokens * num_heads, rel=1e-4)
    across = k.transpose(1, 2).contiguous().transpose(1, 2)  # channels apart
    assert torch.equal(received.attention_received(q, across), found)
