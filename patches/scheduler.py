"""Requests that can never fit end with an error; /server_info shows the pools; idle servers check themselves."""

from __future__ import annotations

import logging
import os

from sglang_rotatek.admission import place_images
from sglang_rotatek.allocator import RotateKAllocator
from sglang_rotatek.metrics import RotateKGauges, snapshot
from sglang_rotatek.radix_cache import RotateKRadixCache, request_state
from sglang_rotatek.segments import image_runs

logger = logging.getLogger(__name__)
DEBUG_ENVIRONMENT = "SGLANG_ROTATEK_DEBUG"


def init_req_max_new_tokens(original, scheduler, req) -> None:
    """Clamp the answer to the KV memory; refuse a prompt that cannot fit it even when it is empty, which the host,
    comparing with the most tokens that fit when all are image tokens, would let wait for ever."""
    original(scheduler, req)
    allocator = scheduler.token_to_kv_pool_allocator
    if not isinstance(allocator, RotateKAllocator) or req.to_finish is not None:
        return
    prompt_tokens = len(req.origin_input_ids)
    layout = allocator.layout
    chunk_tokens = scheduler.chunked_prefill_size
    if chunk_tokens is not None and prompt_tokens <= chunk_tokens:
        chunk_tokens = None
    placement = place_images(
        image_runs(req.origin_input_ids),
        0,
        allocator.config,
        slab_budget=layout.max_visual_slabs,
        basis_budget=layout.num_bases,
        chunk_tokens=chunk_tokens,
        slab_tokens=layout.visual_rows,
    )
    rotated_tokens = placement.rotated_tokens(0, prompt_tokens)
    slabs = placement.max_slabs(0, chunk_tokens, allocator.config.segment_tokens, layout.visual_rows)
    memory = prompt_tokens - rotated_tokens + slabs * layout.text_rows
    # The host admits a request only while prompt + answer + one page stay below the memory's size.
    room = layout.text_slots - memory - 2
    if room < 1:
        req.set_finish_with_abort(
            f"The prompt needs as much KV memory as {memory} text tokens ({prompt_tokens - rotated_tokens} at full width, "
            f"{rotated_tokens} of images with narrow Keys), but there is memory for {layout.text_slots}. Shorten the "
            "prompt, or start the server with more KV memory."
        )
        room = 1
    params = req.sampling_params
    params.max_new_tokens = min(params.max_new_tokens, room)
    params.min_new_tokens = min(params.min_new_tokens, params.max_new_tokens)


def process_pending_chunked_abort(original, scheduler) -> None:
    """Abort a prefill that can never go on. It takes two requests that compute one image at once, one of them at
    full width: sharing the wide copy can lock more memory than the other was admitted for."""
    req, allocator = scheduler.chunked_req, scheduler.token_to_kv_pool_allocator
    if isinstance(allocator, RotateKAllocator) and req is not None and request_state(req).is_stranded:
        allocator.stats.requests_stranded += 1
        logger.error("RotateK: aborting request %s, which fills the memory alone in its prefill.", req.rid)
        scheduler._pending_chunked_abort_req = req
    original(scheduler)


def get_internal_state(result, scheduler, recv_req):
    allocator = scheduler.token_to_kv_pool_allocator
    if isinstance(allocator, RotateKAllocator):
        result.internal_state["rotatek"] = snapshot(allocator)
    return result


def create_gauges(result, scheduler) -> None:
    allocator = scheduler.token_to_kv_pool_allocator
    collector = getattr(scheduler, "metrics_collector", None)
    if isinstance(allocator, RotateKAllocator) and hasattr(collector, "labels"):
        collector.rotatek_gauges = RotateKGauges(allocator, collector.labels)


def check_tree_cache(original, checker) -> None:
    """The host calls this when it is idle. In debug mode a server with inconsistent pools stops."""
    original(checker)
    tree = checker.tree_cache
    if isinstance(tree, RotateKRadixCache) and os.environ.get(DEBUG_ENVIRONMENT) == "1":
        tree.check_integrity_once()
