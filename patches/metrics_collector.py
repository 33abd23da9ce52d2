"""Prometheus gauges beside the host's own."""

from __future__ import annotations

from sglang_rotatek.metrics import RotateKGauges


def log_stats(result, collector, stats) -> None:
    """Runs after each of the host's own updates; the gauges exist only in a RotateK scheduler."""
    gauges: RotateKGauges | None = getattr(collector, "rotatek_gauges", None)
    if gauges is not None:
        gauges.update()
