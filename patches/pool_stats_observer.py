"""Both pools in the host's prefill and decode log lines."""

from __future__ import annotations

from sglang_rotatek.allocator import RotateKAllocator


def get_pool_stats(result, observer):
    allocator = observer.token_to_kv_pool_allocator
    if isinstance(allocator, RotateKAllocator):
        layout = allocator.layout
        result.rotatek_usage = [
            f"text pool usage: {1 - allocator.text_available_size() / layout.text_slots:.2f}",
            f"visual pool usage: {1 - allocator.visual.free / layout.visual_slots:.2f}",
            f"basis usage: {1 - allocator.visual.free_bases / layout.num_bases:.2f}",
        ]
    return result


def usage_msg_parts(result, pool_stats):
    return result + getattr(pool_stats, "rotatek_usage", [])
