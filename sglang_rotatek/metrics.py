"""What a RotateK server tells of itself: /server_info fields and Prometheus gauges."""

from __future__ import annotations

from typing import Any

from .memory.allocator import RotateKAllocator
from .memory.tier import HostTier

KEY_ERROR_BUCKETS = tuple(10.0**exponent for exponent in range(-6, 1))


def snapshot(allocator: RotateKAllocator) -> dict[str, Any]:
    """Sizes and use in slots (= tokens), slabs and bases, counters, seconds and bytes. Used
    includes cached; a total is the most of one kind, and text and images share the slabs."""
    layout, slabs, stats = allocator.layout, allocator.slabs, allocator.stats
    shape = allocator.get_kvcache().shape
    pool_bytes = layout.bytes(shape)
    tier = allocator.tree_cache.tier if allocator.tree_cache is not None else None
    return {
        "rank": shape.rows.rank,
        "key_bits": shape.rows.key_bits,
        "value_bits": shape.rows.value_bits,
        "basis": allocator.config.basis,
        "text_slots_total": layout.text_slots,
        "text_slots_used": slabs.text_tokens,
        "visual_slots_total": layout.visual_slots,
        "visual_slots_used": slabs.visual_tokens,
        "slabs_total": layout.num_slabs,
        "slabs_free": slabs.free,
        "slabs_evictable": slabs.evictable,
        "slabs_of_text": slabs.of_text,
        "slabs_of_images": slabs.of_images,
        "bases_used": slabs.bases,
        "images_compressed": stats.images_compressed,
        "segments_compressed": stats.segments_compressed,
        "tokens_compressed": stats.tokens_compressed,
        "tokens_pruned": stats.tokens_pruned,
        "images_not_pruned": dict(stats.images_not_pruned),
        "segments_full_width": dict(stats.segments_full_width),
        "prefixes_dropped": stats.prefixes_dropped,
        "loads_declined": stats.loads_declined,
        "requests_stranded": stats.requests_stranded,
        "integrity_checks": stats.integrity_checks,
        "requests_mismatched": stats.requests_mismatched,
        "compress_seconds": stats.compress_seconds,
        **stats.errors.summary(),
        "visual_row_bytes": shape.visual_row_bytes,
        "kv_pool_bytes": pool_bytes,
        "stock_tokens": pool_bytes // shape.full_row_bytes,
        "stock_fp8_tokens": pool_bytes // shape.full_row_bytes * shape.dtype_bytes,
        **(_of_host(tier) if tier is not None else {}),
    }


def _of_host(tier: HostTier) -> dict[str, Any]:
    """Of the tier in host memory: seconds are those of copies that are done."""
    slabs, transfers = tier.tree.slabs, tier.memory.stats
    return {
        "host_slabs_total": tier.memory.num_slabs,
        "host_slabs_used": tier.memory.num_slabs - slabs.free,
        "host_text_tokens": slabs.text_tokens,
        "host_visual_tokens": slabs.visual_tokens,
        "host_tokens_loaded": tier.tokens_loaded,
        "host_writes_skipped": tier.writes_skipped,
        "host_written_bytes": transfers.written_bytes,
        "host_write_seconds": transfers.write_seconds,
        "host_loaded_bytes": transfers.loaded_bytes,
        "host_load_seconds": transfers.load_seconds,
    }


class RotateKGauges:
    """One gauge per number of ``snapshot``, named ``sglang:rotatek_<field>``, and a histogram of
    the errors."""

    def __init__(self, allocator: RotateKAllocator, labels: dict[str, str]) -> None:
        # Imported after the host has set PROMETHEUS_MULTIPROC_DIR.
        from prometheus_client import Gauge, Histogram

        self._allocator = allocator
        self._labels = labels
        numbers = [
            name for name, value in snapshot(allocator).items() if isinstance(value, (int, float))
        ]
        self._gauges = {
            name: Gauge(
                f"sglang:rotatek_{name}",
                f"RotateK: {name.replace('_', ' ')}.",
                labelnames=list(labels),
                multiprocess_mode="mostrecent",
            )
            for name in numbers
        }
        self._by_reason = {
            name: Gauge(
                f"sglang:rotatek_{name}",
                what,
                labelnames=[*labels, "reason"],
                multiprocess_mode="mostrecent",
            )
            for name, what in (
                (
                    "segments_full_width",
                    "RotateK: image parts that keep full-width Keys, by reason.",
                ),
                ("images_not_pruned", "RotateK: images that keep all their tokens, by reason."),
            )
        }
        self._key_error = Histogram(
            "sglang:rotatek_key_error",
            "RotateK: squared error of an image segment's stored Keys, as a share of their centred "
            "energy.",
            labelnames=list(labels),
            buckets=KEY_ERROR_BUCKETS,
        )
        self.update()

    def update(self) -> None:
        values = snapshot(self._allocator)
        for name, gauge in self._gauges.items():
            gauge.labels(**self._labels).set(values[name])
        for name, gauge in self._by_reason.items():
            for reason, count in values[name].items():
                gauge.labels(**self._labels, reason=reason).set(count)
        new_errors = self._allocator.stats.errors.new
        while new_errors:
            self._key_error.labels(**self._labels).observe(new_errors.popleft())
