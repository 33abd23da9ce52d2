"""Loaded pictures, in the forms that the host hands to image processors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

Picture = Image.Image | np.ndarray | torch.Tensor


def channel_axis(picture: np.ndarray | torch.Tensor) -> int:
    """0 or 2: where the channels of a picture of three dimensions are. A tensor has them first and
    an array last, as torchvision and PIL make them, unless only the other end has 1, 3 or 4."""
    axes = (0, 2) if isinstance(picture, torch.Tensor) else (2, 0)
    for axis in axes:
        if picture.ndim == 3 and picture.shape[axis] in (1, 3, 4):
            return axis
    raise ValueError(
        "a picture must have 1, 3 or 4 channels, first or last; got the shape "
        f"{tuple(picture.shape)}."
    )


def rgb(picture: Picture) -> Picture:
    """A loaded picture with three channels. Arrays and tensors, on any device, are gray, RGB or
    RGBA; the host decodes JPEG on a GPU to uint8 [1 or 3, H, W], and image processors take no gray
    one. A PIL image stays as it is: they convert it. ValueError for another shape."""
    if isinstance(picture, Image.Image):
        return picture
    if picture.ndim == 2:
        picture = picture[None] if isinstance(picture, torch.Tensor) else picture[..., None]
    axis = channel_axis(picture)
    if picture.shape[axis] == 1:
        if isinstance(picture, torch.Tensor):
            return torch.cat([picture] * 3, axis)
        return np.concatenate([picture] * 3, axis)
    return picture[:3] if axis == 0 else picture[..., :3]


def picture_size(picture: Picture) -> tuple[int, int]:
    """(height, width) px of an RGB picture."""
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    return tuple(picture.shape[1:] if channel_axis(picture) == 0 else picture.shape[:2])


def alike(loaded: list[Any]) -> list[Any]:
    """The pictures of one request in a form that an image processor can stack: RGB, and all on the
    GPU when one is, as the host decodes JPEG to tensors there and other formats to PIL images. What
    is no picture, but was processed by the client, stays."""
    pictures = [rgb(each) if isinstance(each, Picture) else each for each in loaded]
    device = next(
        (each.device for each in pictures if isinstance(each, torch.Tensor) and each.is_cuda), None
    )
    return pictures if device is None else [_on_device(each, device) for each in pictures]


def _on_device(picture: Any, device: torch.device) -> Any:
    """A tensor [3, H, W] on ``device`` of an RGB picture."""
    if isinstance(picture, Image.Image):
        picture = np.array(picture.convert("RGB"))
    if isinstance(picture, np.ndarray):
        first = picture if channel_axis(picture) == 0 else picture.transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(first)).to(device)
    return picture.to(device) if isinstance(picture, torch.Tensor) else picture
