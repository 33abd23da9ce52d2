"""What kernels ask of a GPU."""

from __future__ import annotations

import functools

import torch


@functools.cache
def has_overlap(device: torch.device) -> bool:
    """Whether the GPU can start a kernel before its predecessor ends (programmatic dependent
    launch: Hopper on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def has_ptx(device: torch.device) -> bool:
    """Whether kernels may hold some; Triton's interpreter knows none."""
    return device.type == "cuda"


@functools.cache
def has_large_shared_memory(device: torch.device) -> bool:
    """A100, Hopper and B200 do; many others give a program some 100 KiB, enough for two stages."""
    if device.type != "cuda":
        return True
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin >= 144 << 10  # type: ignore[attr-defined]
