"""The radix cache of --enable-hierarchical-cache: what leaves the device stays in host memory."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

from sglang.srt.mem_cache.base_prefix_cache import (
    InitLoadBackParams,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.radix_cache import RadixKey, TreeNode

from .tier import HostTier
from .tree import RotateKRadixCache

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams


class TieredRadixCache(RotateKRadixCache):
    """``tier`` stands also where the host's scheduler expects parts of its own."""

    tier: HostTier
    # The host empties its caches only without: nothing here waits for them.
    ongoing_write_through = ongoing_load_back = ()
    enable_storage = False

    def __init__(self, params: CacheInitParams, tier: HostTier) -> None:
        self.tier = self.cache_controller = self.token_to_kv_pool_host = tier
        super().__init__(params)

    def reset(self) -> None:
        super().reset()
        self.tier.reset()

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """Also what host memory has behind what the device has."""
        key, result = params.key, super().match_prefix(params)
        at = result.device_prefix_len
        # A child that begins with the next token is an inexact image, in whose place nothing can be
        # loaded.
        if at == len(key) or key.child_key_at(at) in result.last_device_node.children:
            return result
        node, hit = self.tier.match(key, at, self.inexact)
        if not hit:
            return result
        return result._replace(last_host_node=node, best_match_node=node, host_hit_length=hit)

    def checkpoint(self, req: Req, *, up_to: int) -> None:
        """Also writes what enough requests have had."""
        super().checkpoint(req, up_to=up_to)
        if (threshold := self.tier.write_threshold) is None:
            return
        path = reversed(list(self._path(req.last_node)))
        if asked := list(takewhile(lambda each: each.hit_count >= threshold, path)):
            end = sum(len(each.key) for each in asked)
            key = RadixKey(
                req.full_untruncated_fill_ids[:end], req.extra_key, cache_salt=req.cache_salt
            )
            self.tier.write(self, asked[-1], key, self.inexact)

    def _before_eviction(self, leaf: TreeNode) -> None:
        if self.tier.write_threshold is None:
            self.tier.write(self, leaf, self._key_to(leaf), self.inexact)

    def init_load_back(self, params: InitLoadBackParams) -> tuple[int, TreeNode]:
        """Bring the tokens of ``params.host_hit_length`` behind the request's prefix, which is
        locked, from the host. Admission made sure that slabs are there or can be evicted. Returns
        their number and their node."""
        req, at = params.req, params.req.prefix_len
        key = RadixKey(req.full_untruncated_fill_ids, req.extra_key, cache_salt=req.cache_salt)
        node = req.last_node
        for end, spans in self.tier.load(self, params.best_match_node, at):
            node = self.adopt(
                node, key[at:end], [span.moved(-at) for span in spans], req.priority or 0
            )
            self._unbound += [
                (span.slots(self.layout), span.basis) for span in spans if not span.is_text
            ]
            at = end
        last = node.held.spans[-1]
        if last.is_text and (next_row := last.next_row(self.layout)) < self.layout.text_rows:
            node.held.open_row = next_row
        return params.host_hit_length, node

    def ready_to_load_host_cache(self) -> int:
        return self.tier.memory.start_loading()

    def check_hicache_events(self) -> None:
        self.tier.memory.settle()

    def clear_storage_backend(self) -> None:
        """There is none."""

    def release_host_resources(self) -> None:
        self.tier.memory.release()

    def check_integrity(self, *, idle: bool = True) -> None:
        super().check_integrity(idle=idle)
        self.tier.check_integrity()
