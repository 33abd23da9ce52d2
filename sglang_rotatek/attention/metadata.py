"""What the GPU backend knows of the forward that runs."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels.plan import Plan
from .compressor import Images


class Expansion(NamedTuple):
    """Prefixes of a prefill at full width, with its new tokens behind each: see expand.expand."""

    req_pool_indices: torch.Tensor
    prefix_lens: torch.Tensor
    kv_indptr: torch.Tensor
    max_len: int
    keys: torch.Tensor
    values: torch.Tensor


class ForwardMetadata(NamedTuple):
    """Of one forward. ``plan`` is None in a prefill without any cached prefix, and where it is
    expanded; ``is_stored``: it covers the new tokens too, else the prefix alone."""

    plan: Plan | None
    q_indptr: torch.Tensor
    images: Images | None = None
    is_stored: bool = False
    expansion: Expansion | None = None
