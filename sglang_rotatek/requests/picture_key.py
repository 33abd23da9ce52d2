"""What the caches take for one picture."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any


def picture_key(feature_hash: int, facts: Mapping[str, Any]) -> int:
    """64-bit key of a picture for the caches: of its features and of the small ``facts`` that tell
    how they lie, such as the grid. Two blank pictures of other shape have the same features and
    other positions."""
    digest = hashlib.sha256(feature_hash.to_bytes(8, "big"))
    for name in sorted(facts):
        digest.update(repr((name, _plain(facts[name]))).encode())
    return int.from_bytes(digest.digest()[:8], "big")


def _plain(value: Any) -> Any:
    """``value`` with every tensor or array as a list, so that its text is the same in every
    process."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value
