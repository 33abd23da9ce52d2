"""Evict for what is really short: decode and text take text slots, whatever the host's number says."""

from __future__ import annotations

from sglang_rotatek.radix_cache import RotateKRadixCache


def evict_from_tree_cache(original, tree_cache, num_tokens: int):
    if not isinstance(tree_cache, RotateKRadixCache):
        return original(tree_cache, num_tokens)
    tree_cache.make_room(text=tree_cache.token_to_kv_pool_allocator.text_tokens_of(num_tokens))
