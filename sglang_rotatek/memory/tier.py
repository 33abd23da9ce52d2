"""The host-memory tier: what the host keeps of the radix cache, when it is written, and how it
comes back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey, TreeNode

from .allocator import InexactImages
from .host import HostMemory
from .layout import PoolLayout
from .rows import Slabs, Span, use_of
from .slab_tree import SlabTree

LEAST_TOKENS = 10  # of a host hit, as the host's load_back_threshold: fewer are computed sooner


class Price(NamedTuple):
    """What a load takes on the device: slabs, those for images among them, and segments."""

    slabs: int = 0
    of_images: int = 0
    segments: int = 0


class HostTier:
    """A radix tree of its own, over slabs of host memory. Nothing ties its nodes to those of the
    device's tree: a prefix may be in either, in both or in neither, each cut where its own tree
    cuts it, and lost to one it is not lost to the other.

    A device slab has a *mirror*, the host slab that all its rows on the host are in, from when it
    is written, or loaded whole, until either is free. What is written of it later goes there too,
    so that nodes that share a slab share one on the host. That spoils nothing: a row that a node
    ever held keeps what is in it until its slab is free.

    It stands where the host expects its ``cache_controller`` and ``token_to_kv_pool_host``.
    ``write_policy``: the host's --hicache-write-policy.
    """

    storage_backend = storage_backend_type = None  # no third tier
    write_fence_stream = None  # which the host sets to the same stream as the other

    def __init__(
        self, params: CacheInitParams, device: Slabs, memory: HostMemory, write_policy: str
    ) -> None:
        self.device, self.memory, self.write_policy = device, memory, write_policy
        num_slabs = memory.num_slabs
        layout = PoolLayout(
            num_slabs, num_slabs, device.layout.text_rows, device.layout.visual_rows
        )
        # How many requests must have had a token before it is written; write_back writes what is
        # evicted.
        self.write_threshold = {
            "write_through": 1,
            "write_through_selective": 2,
            "write_back": None,
        }[write_policy]
        self.tokens_loaded = self.writes_skipped = 0
        host_params = CacheInitParams(
            disable=False, req_to_token_pool=None, token_to_kv_pool_allocator=None, page_size=1,
            eviction_policy=params.eviction_policy,
            eviction_policy_config=params.eviction_policy_config,
        )  # fmt: skip
        # Device slab -> host slab.
        self._mirror = np.zeros(1 + device.layout.num_slabs, dtype=np.int64)
        self._mirrored = np.zeros(1 + num_slabs, dtype=np.int64)  # and back
        self.tree = SlabTree(host_params, Slabs(layout))
        device.before_reuse = self._before_reuse

    def reset(self) -> None:
        self.tree.reset()
        self._mirror[:] = 0

    def _before_reuse(self, device_slabs: np.ndarray) -> None:
        self._mirror[device_slabs] = 0
        self.memory.before_reuse(device_slabs)

    # --- what the host asks of its controller and host pool ---------------------------------------

    @property
    def load_fence_stream(self) -> torch.cuda.Stream | None:
        """The stream of forwards."""
        return self.memory.forward_stream

    @load_fence_stream.setter
    def load_fence_stream(self, stream: torch.cuda.Stream) -> None:
        self.memory.forward_stream = stream

    @property
    def logical_size(self) -> int:
        """Tokens that fit at most."""
        return self.tree.layout.total_slots

    def available_size(self) -> int:
        return self.logical_size - self.tree.slabs.text_tokens - self.tree.slabs.visual_tokens

    # --- to the host ------------------------------------------------------------------------------

    def write(self, tree: SlabTree, node: TreeNode, key: RadixKey, inexact: InexactImages) -> None:
        """Copy what the host lacks of ``key``, which leads to ``node`` of the device's tree,
        evicting what was used least lately; nothing, and counted, where it does not fit."""
        self.tree.drop_inexact(key, inexact)
        match = self.tree.match_prefix(MatchPrefixParams(key=key))
        at, parent = match.device_prefix_len, match.last_device_node
        if at == len(key):
            return
        pieces = tree.spans_behind(node, at)
        slabs = use_of([span for _, spans in pieces for span in spans], tree.layout).slabs
        with self._locked(parent):
            if not self._mirror_all(slabs):
                self.writes_skipped += 1
                return
        self.memory.write(slabs, self._mirror[slabs])
        for end, spans in pieces:
            spans = [_moved(span, self._mirror, -at) for span in spans]
            parent = self.tree.adopt(parent, key[at:end], spans, node.priority)
            at = end

    def _mirror_all(self, device_slabs: np.ndarray) -> bool:
        """Give each of the slabs a mirror, or none where there is no room for all."""
        host = self.tree.slabs
        while len(missing := device_slabs[~self._have_mirrors(device_slabs)]) > host.free:
            if len(missing) > host.reachable:
                return False
            self.tree.make_room(len(missing))  # perhaps of mirrors, too
        self._take(host, missing, self.device, self._mirror)
        self._mirrored[self._mirror[missing]] = missing
        return True

    def _have_mirrors(self, device_slabs: np.ndarray) -> np.ndarray:
        """Bool [n]."""
        mirrors = self._mirror[device_slabs]
        return (
            (mirrors > 0)
            & (self._mirrored[mirrors] == device_slabs)
            & (self.tree.slabs.live(mirrors) > 0)
        )

    # --- to the device ----------------------------------------------------------------------------

    def match(
        self, key: RadixKey, start: int, inexact: InexactImages
    ) -> tuple[TreeNode | None, int]:
        """How many tokens of ``key`` behind the first ``start`` the host has, and its node; (None,
        0) for few."""
        if len(key) - start < LEAST_TOKENS:
            return None, 0
        match = self.tree.match_exact(key, inexact)
        hit = match.device_prefix_len - start
        return (match.last_device_node, hit) if hit >= LEAST_TOKENS else (None, 0)

    def price(self, node: TreeNode, start: int) -> Price:
        """Of the tokens behind the first ``start`` on the path to ``node``."""
        spans = [span for _, spans in self.tree.spans_behind(node, start) for span in spans]
        slabs = use_of(spans, self.tree.layout).slabs
        of_images = int(np.count_nonzero(self.tree.slabs.kinds(slabs) >= Slabs.IMAGE))
        return Price(len(slabs), of_images, sum(not span.is_text for span in spans))

    def load(self, tree: SlabTree, node: TreeNode, start: int) -> list[tuple[int, list[Span]]]:
        """Bring these tokens to the device: spans by node, as of ``SlabTree.spans_behind``, in
        slabs that are taken and hold nothing yet. There must be room; what is evicted for it costs
        the host none of these tokens."""
        price, host = self.price(node, start), self.tree.slabs
        with self._locked(node):
            tree.make_room(price.slabs, of_images=price.of_images)
        pieces = self.tree.spans_behind(node, start)
        use = use_of([span for _, spans in pieces for span in spans], self.tree.layout)
        targets = np.zeros_like(self._mirrored)
        self._take(self.device, use.slabs, host, targets)
        self.memory.load(use.slabs, targets[use.slabs])
        whole = use.slabs[use.counts == host.live(use.slabs)]
        self._mirror[targets[whole]], self._mirrored[whole] = whole, targets[whole]
        self.tokens_loaded += pieces[-1][0] - start
        return [(end, [_moved(span, targets, 0) for span in spans]) for end, spans in pieces]

    @staticmethod
    def _take(slabs: Slabs, like: np.ndarray, of: Slabs, into: np.ndarray) -> None:
        """Take a slab of its kind for each of the slabs ``like``, which are ``of`` the other tier:
        into[like]."""
        kinds = of.kinds(like)
        for kind in np.unique(kinds):
            of_kind = like[kinds == kind]
            into[of_kind] = slabs.take(len(of_kind), int(kind))

    @contextmanager
    def _locked(self, node: TreeNode) -> Iterator[None]:
        lock = self.tree.lock(node)
        yield
        self.tree.unlock(lock)

    # --- checks -----------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """AssertionError unless the host's records explain its counts."""
        held, locked = self.tree.check_nodes()
        self.tree.slabs.check_integrity(held, locked)


def _moved(span: Span, slabs: np.ndarray, by: int) -> Span:
    """The span ``by`` positions on, in ``slabs`` [its old slab]."""
    basis = span.basis if span.is_text else int(slabs[span.basis])
    return replace(span, start=span.start + by, slabs=slabs[span.slabs], basis=basis)
