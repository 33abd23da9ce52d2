"""Loaded pictures of every kind that the host hands to an image processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sglang_rotatek.requests.pictures import _on_device, alike, picture_size, rgb

PICTURES = {
    "pil": lambda height, width: Image.new("RGB", (width, height)),
    "pil_gray": lambda height, width: Image.new("L", (width, height)),
    "array_hwc": lambda height, width: np.zeros((height, width, 3), np.uint8),
    "array_gray": lambda height, width: np.zeros((height, width), np.uint8),
    "tensor_chw": lambda height, width: torch.zeros(3, height, width, dtype=torch.uint8),
    "tensor_gray_chw": lambda height, width: torch.zeros(1, height, width, dtype=torch.uint8),
    "tensor_rgba_chw": lambda height, width: torch.zeros(4, height, width, dtype=torch.uint8),
    "tensor_float_hwc": lambda height, width: torch.zeros(height, width, 3),
    # As the host decodes JPEG on a GPU; a device without data has the same attributes.
    "tensor_on_a_device": lambda height, width: torch.zeros(
        3, height, width, dtype=torch.uint8, device="meta"
    ),
}


def test_a_picture_without_channels_is_refused_by_its_shape():
    with pytest.raises(
        ValueError, match=r"1, 3 or 4 channels, first or last; got the shape \(2, 20, 30\)"
    ):
        rgb(torch.zeros(2, 20, 30))


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_becomes_rgb_and_keeps_its_size(kind):
    picture = rgb(PICTURES[kind](20, 300))
    assert picture_size(picture) == (20, 300)
    assert isinstance(picture, Image.Image) or 3 in (picture.shape[0], picture.shape[2])


@pytest.mark.parametrize("kind", [kind for kind in PICTURES if "device" not in kind])
@pytest.mark.parametrize("height", [3, 20])
def test_beside_a_tensor_on_a_gpu_every_picture_becomes_one(kind, height):
    assert _on_device(rgb(PICTURES[kind](height, 300)), torch.device("cpu")).shape in (
        (3, height, 300),
        (height, 300, 3),
    )


def test_pixels_stay_where_they_are():
    pixels = np.arange(2 * 5 * 3, dtype=np.uint8).reshape(2, 5, 3)
    for picture in (
        pixels,
        Image.fromarray(pixels),
        torch.from_numpy(pixels.transpose(2, 0, 1).copy()),
    ):
        assert (
            _on_device(rgb(picture), torch.device("cpu")).numpy() == pixels.transpose(2, 0, 1)
        ).all()


def test_pictures_on_the_cpu_stay_in_their_form():
    picture, processed = Image.new("RGB", (30, 20)), {"format": "processor_output"}
    assert alike([picture, processed]) == [picture, processed]


@pytest.mark.gpu
def test_pictures_beside_one_on_the_gpu_go_there():
    both = alike(
        [Image.new("L", (30, 20)), torch.zeros(1, 20, 30, dtype=torch.uint8, device="cuda")]
    )
    assert [(each.shape, each.device.type) for each in both] == [((3, 20, 30), "cuda")] * 2
