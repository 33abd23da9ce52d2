"""Text and images in the host's prefill and decode log lines."""

from __future__ import annotations

from sglang_rotatek.allocator import RotateKAllocator


def get_pool_stats(result, observer):
    allocator = observer.token_to_kv_pool_allocator
    if isinstance(allocator, RotateKAllocator):
        layout, visual = allocator.layout, allocator.visual
        # The host's share of ``size``, which is in image tokens, would be low for text.
        result.full_token_usage = 1 - observer.tree_cache.text_reachable_size() / layout.text_slots
        result.rotatek_usage = [
            f"KV memory of text: {allocator.text_used / layout.text_slots:.2f}",
            f"of images: {visual.used_slabs / layout.num_slabs:.2f}",
        ]
    return result


def usage_msg_parts(result, pool_stats):
    return result + getattr(pool_stats, "rotatek_usage", [])
