"""How much host memory the tier takes, by the host's flags."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

from sglang_rotatek.config import RotateKConfig, RotateKError
from sglang_rotatek.kernels.row_format import RowFormat
from sglang_rotatek.memory.allocator import RotateKAllocator
from sglang_rotatek.memory.layout import KVShape, layout_of_slabs
from sglang_rotatek.memory.pool import RotateKKVPool
from sglang_rotatek.metrics import snapshot
from sglang_rotatek.patches import registry

pytestmark = pytest.mark.usefixtures("host_configuration")
SHAPE = KVShape(
    2, 2, head_dim=64, v_head_dim=64, rows=RowFormat(16, 4, 4), kv_bytes=2, dtype_bytes=2
)
NUM_SLABS = 10


def radix_cache(
    monkeypatch, *, enabled: bool = True, ratio: float = 2.0, size: float = 0, free: int = 1 << 40
):
    layout = layout_of_slabs(NUM_SLABS, RotateKConfig(), SHAPE)
    pool = RotateKKVPool(
        layout, SHAPE, torch.bfloat16, page_size=1, dtype=torch.bfloat16, head_num=2, head_dim=64,
        v_head_dim=64, layer_num=2, device="cpu", enable_memory_saver=False, start_layer=0,
        end_layer=1,
    )  # fmt: skip
    allocator = RotateKAllocator(layout, RotateKConfig(), torch.bfloat16, "cpu", pool)
    params = CacheInitParams(
        False, ReqToTokenPool(4, 64, "cpu", enable_memory_saver=False), allocator, page_size=1
    )
    flags = SimpleNamespace(
        hicache_ratio=ratio, hicache_size=size, hicache_write_policy="write_through"
    )
    monkeypatch.setattr(registry, "get_memory", lambda: flags)
    monkeypatch.setattr(registry, "host_memory_budget_bytes", lambda wanted: free)
    counters = []
    worker = SimpleNamespace(register_hicache_layer_transfer_counter=counters.append)
    context = SimpleNamespace(params=params, enable_hierarchical_cache=enabled, tp_worker=worker)
    tree = registry.radix_cache(context)
    assert counters == ([tree.tier.memory] if enabled else [])
    assert pool.layer_transfer_counter is (tree.tier.memory if enabled else None)
    return tree, pool


def test_without_the_hosts_flag_there_is_no_tier(monkeypatch):
    tree, _ = radix_cache(monkeypatch, enabled=False)
    assert tree.tier is tree.cache_controller is None
    assert not any(name.startswith("host_") for name in snapshot(tree.token_to_kv_pool_allocator))


def test_a_ratio_is_of_the_devices_slabs_and_a_size_goes_before_it(monkeypatch):
    tree, pool = radix_cache(monkeypatch, ratio=2.5)
    assert tree.tier.memory.slabs.shape == (2, 1 + 25, pool.slabs.shape[2])
    tree, _ = radix_cache(monkeypatch, size=7.5 * SHAPE.slab_bytes / 1e9)
    assert tree.tier.memory.num_slabs == 7
    assert (
        tree.token_to_kv_pool_host.logical_size
        == tree.tier.available_size()
        == 7 * SHAPE.visual_rows
    )
    assert snapshot(tree.token_to_kv_pool_allocator)["host_slabs_total"] == 7


@pytest.mark.parametrize(
    ("size", "ratio", "flag"), [(3, 2.0, "--hicache-size 3"), (0, 2.0, "--hicache-ratio 2.0")]
)
def test_more_than_the_machine_has_is_refused(monkeypatch, size, ratio, flag):
    with pytest.raises(
        RotateKError, match=f"^{flag} asks for .* at most the 0.00 GB that are free; change it"
    ):
        radix_cache(monkeypatch, size=size, ratio=ratio, free=1000)


def test_less_than_a_slab_is_refused(monkeypatch):
    with pytest.raises(
        RotateKError, match="^--hicache-ratio 0.01 asks for 0.00 GB .* at least a slab"
    ):
        radix_cache(monkeypatch, ratio=0.01)


def test_the_pools_slabs_are_its_memory(monkeypatch):
    _, pool = radix_cache(monkeypatch, enabled=False)
    assert pool.slabs.shape[:2] == (2, 1 + NUM_SLABS)
    assert pool.slabs.nbytes == pool.memory.nbytes == (1 + NUM_SLABS) * SHAPE.slab_bytes
    pool.slabs[1, 3] = -1
    rows = pool.k_buffer[1].view(torch.uint8).flatten(1)
    touched = (rows == 255).all(1).nonzero().flatten().tolist()
    assert touched == list(range(3 * SHAPE.text_rows, 4 * SHAPE.text_rows))
