"""On a machine without a GPU the host's index kernels must be the torch ones for our backend too."""

from __future__ import annotations

import torch

from .server_args import BACKEND


def support_triton(original, backend: str) -> bool:
    if backend == BACKEND and not torch.cuda.is_available():
        return False
    return original(backend)
