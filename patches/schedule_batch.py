"""A decode step fits when there are text slots for it."""

from __future__ import annotations

from sglang_rotatek.allocator import RotateKAllocator


def check_decode_mem(original, batch, selected_indices=None) -> bool:
    allocator = batch.token_to_kv_pool_allocator
    if not isinstance(allocator, RotateKAllocator):
        return original(batch, selected_indices)
    num_tokens = batch.new_tokens_required_next_decode(selected_indices)
    batch.tree_cache.make_room(text=num_tokens)
    return allocator.text_available_size() >= num_tokens
