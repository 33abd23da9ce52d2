"""Text and images in the host's prefill and decode log lines, and in the Prometheus gauges."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sglang.srt.managers.scheduler_components.pool_stats_observer import PoolStats

from sglang_rotatek.memory.allocator import RotateKAllocator
from sglang_rotatek.metrics import RotateKGauges

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler_components.pool_stats_observer import (
        SchedulerPoolStatsObserver,
    )
    from sglang.srt.observability.metrics_collector import SchedulerStats


@dataclasses.dataclass
class RotateKPoolStats(PoolStats):
    """The host's, with the use by kind at the end of its messages. ``gauges``: RotateK's, set with
    the host's."""

    usage: list[str] = dataclasses.field(default_factory=list)
    gauges: RotateKGauges | None = None

    def get_prefill_usage_msg_parts(self) -> list[str]:
        return super().get_prefill_usage_msg_parts() + self.usage

    def get_decode_usage_msg_parts(self) -> list[str]:
        return super().get_decode_usage_msg_parts() + self.usage

    def update_scheduler_stats(self, stats: SchedulerStats) -> None:
        super().update_scheduler_stats(stats)
        if self.gauges is not None:
            self.gauges.update()


def get_pool_stats(result: PoolStats, observer: SchedulerPoolStatsObserver) -> PoolStats:
    """Runs before the host's log lines and metrics, and in an idle server all the time."""
    allocator = observer.token_to_kv_pool_allocator
    if not isinstance(allocator, RotateKAllocator):
        return result
    layout, slabs = allocator.layout, allocator.slabs
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    # The host's share of ``size``, which is in image tokens, would be low for text.
    fields["full_token_usage"] = 1 - slabs.reachable / layout.num_slabs
    return RotateKPoolStats(
        **fields,
        gauges=allocator.gauges,
        usage=[
            f"KV memory of text: {slabs.of_text / layout.num_slabs:.2f}",
            f"of images: {slabs.of_images / layout.num_slabs:.2f}",
        ],
    )
