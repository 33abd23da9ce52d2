"""Which requests fit, and an error for those that never can; /server_info and Prometheus show the
pools."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from sglang_rotatek.memory.admission import RotateKPrefillAdder
from sglang_rotatek.memory.allocator import RotateKAllocator
from sglang_rotatek.memory.placement import place_images, prompt_runs
from sglang_rotatek.memory.segments import ImageRun, image_runs, match_offsets
from sglang_rotatek.metrics import RotateKGauges, snapshot

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import GetInternalStateReq, GetInternalStateReqOutput
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.schedule_policy import PrefillAdder
    from sglang.srt.managers.scheduler import Scheduler


def get_prefill_adder_class(
    original: Callable[[Scheduler], type[PrefillAdder]], scheduler: Scheduler
) -> Callable[..., PrefillAdder]:
    if not isinstance(scheduler.token_to_kv_pool_allocator, RotateKAllocator):
        return original(scheduler)
    return partial(RotateKPrefillAdder, scheduler=scheduler)


def init_req_max_new_tokens(
    original: Callable[[Scheduler, Req], None], scheduler: Scheduler, req: Req
) -> None:
    """Clamp the answer to the KV memory; refuse a prompt that cannot fit it even when it is empty,
    which the host, comparing with the most tokens that fit when all are image tokens, would let
    wait for ever."""
    original(scheduler, req)
    allocator = scheduler.token_to_kv_pool_allocator
    if not isinstance(allocator, RotateKAllocator) or req.to_finish is not None:
        return
    prompt_tokens, chunk_tokens = len(req.origin_input_ids), scheduler.chunked_prefill_size
    params, text_slots = req.sampling_params, allocator.layout.text_slots
    if req.multimodal_inputs is not None:
        offsets = [span for item in req.multimodal_inputs.mm_items for span in item.offsets or ()]
        runs = image_runs(req.origin_input_ids) if offsets else []
        if offsets and not match_offsets(runs, offsets):
            allocator.stats.mismatched_images(req.rid, len(offsets), len(runs))
    is_cut = chunk_tokens is not None and prompt_tokens > chunk_tokens
    if allocator.config.max_error is not None:
        allocator.settle_errors()
    runs = prompt_runs(req, allocator.inexact)
    memory, rotated_tokens = _memory(
        allocator, runs, prompt_tokens, chunk_tokens if is_cut else None
    )
    # The host admits a request only while prompt + answer + one page stay below the memory's size;
    # the text's last slab may be filled by a row alone.
    reserve = allocator.layout.text_rows + 2
    room = text_slots - memory - reserve
    if room < 1:
        req.set_finish_with_abort(
            f"The prompt needs as much KV memory as {memory} text tokens "
            f"({prompt_tokens - rotated_tokens} at full width, {rotated_tokens} of images with "
            f"narrow Keys), but there is memory for {text_slots}. Shorten the prompt, or start the "
            "server with more KV memory."
        )
        room = 1
    answer = min(params.max_new_tokens, room)
    if chunk_tokens is not None and not is_cut and prompt_tokens + answer > chunk_tokens:
        # Retracted with a longer answer, it would be prefilled in chunks, which cut its images.
        cut_room = text_slots - _memory(allocator, runs, prompt_tokens, chunk_tokens)[0] - reserve
        answer = min(answer, max(cut_room, chunk_tokens - prompt_tokens, 1))
    params.max_new_tokens = answer
    params.min_new_tokens = min(params.min_new_tokens, params.max_new_tokens)


def _memory(
    allocator: RotateKAllocator, runs: list[ImageRun], prompt_tokens: int, chunk_tokens: int | None
) -> tuple[int, int]:
    """Text slots that a prompt takes in an empty server, slabs as the text they could hold; and its
    rotated tokens."""
    layout, config = allocator.layout, allocator.config
    placement = place_images(
        runs,
        0,
        config,
        slab_budget=layout.max_visual_slabs,
        chunk_tokens=chunk_tokens,
        layout=layout,
    )
    rotated_tokens = placement.rotated_tokens(0, prompt_tokens)
    slabs = placement.max_slabs(0, chunk_tokens)
    return prompt_tokens - rotated_tokens + slabs * layout.text_rows, rotated_tokens


def get_internal_state(
    result: GetInternalStateReqOutput, scheduler: Scheduler, recv_req: GetInternalStateReq
) -> GetInternalStateReqOutput:
    allocator = scheduler.token_to_kv_pool_allocator
    if isinstance(allocator, RotateKAllocator):
        result.internal_state["rotatek"] = snapshot(allocator)
    return result


def create_gauges(result: Any, scheduler: Scheduler) -> None:
    allocator = scheduler.token_to_kv_pool_allocator
    collector = getattr(scheduler, "metrics_collector", None)
    labels = getattr(collector, "labels", None)
    if isinstance(allocator, RotateKAllocator) and labels is not None:
        allocator.gauges = RotateKGauges(allocator, labels)
