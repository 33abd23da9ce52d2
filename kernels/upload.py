"""Small host arrays on the device, without a wait."""

from __future__ import annotations

import numpy as np
import torch


def upload(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """``array`` on ``device``, through pinned memory: from pageable memory the copy may wait for
    the stream, hence for the forward in flight. On the CPU the result shares the array's memory."""
    host = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
