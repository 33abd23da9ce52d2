"""What the caches take for one picture: its features, and how they lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sglang.srt.runtime_context import get_server_args

from sglang_rotatek.pruning.shrink import KEPT, PRUNER
from sglang_rotatek.requests.picture_key import picture_key

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import MultimodalDataItem

# Of an item's data, what tells how its features lie; the rest may be large, or of the transport.
FACTS = (
    "image_grid_thw",
    "image_grid_hws",
    "image_sizes",
    "image_aspect_ratio",
    "num_patches",
    "second_per_grid_ts",
    "video_grid_thw",
    "video_timestamps",
    KEPT,
    PRUNER,
)


def set_pad_value(original: Callable[[MultimodalDataItem], None], item: MultimodalDataItem) -> None:
    """The host makes the key of the features' bytes alone; a key that the client or a processor
    gave stays."""
    is_ours = (
        item.pad_value is None
        and item.hash is None
        and getattr(get_server_args(), "enable_rotatek", False)
    )
    original(item)
    if is_ours:
        facts = {
            name: item.model_specific_data[name]
            for name in FACTS
            if name in item.model_specific_data
        }
        shape = getattr(item.feature, "shape", None)
        item.set_hash(
            picture_key(
                item.hash, facts | {"modality": item.modality.name, "shape": list(shape or ())}
            )
        )
