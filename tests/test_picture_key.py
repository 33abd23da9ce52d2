"""Two pictures are one for the caches only if their features are the same and lie alike."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem

from sglang_rotatek.patches import schedule_batch
from sglang_rotatek.requests.picture_key import picture_key


def test_the_grid_is_part_of_the_identity_and_its_container_is_not():
    wide = picture_key(5, {"image_grid_thw": torch.tensor([[1, 24, 48]])})
    assert wide != picture_key(5, {"image_grid_thw": torch.tensor([[1, 48, 24]])})
    assert wide != picture_key(6, {"image_grid_thw": torch.tensor([[1, 24, 48]])})
    assert wide == picture_key(5, {"image_grid_thw": np.array([[1, 24, 48]])})
    assert wide == picture_key(5, {"image_grid_thw": [(1, 24, 48)]})
    assert wide == picture_key(5, {"image_grid_thw": [torch.tensor([1, 24, 48])]})
    assert 0 <= wide < 2**64


def test_the_identity_does_not_depend_on_the_order_of_the_facts():
    facts = {"image_sizes": [(672, 336)], "image_aspect_ratio": "anyres"}
    assert picture_key(1, facts) == picture_key(1, dict(reversed(facts.items())))


def image(feature, **data) -> MultimodalDataItem:
    return MultimodalDataItem(modality=Modality.IMAGE, feature=feature, model_specific_data=data)


@pytest.fixture
def rotatek_is_on(monkeypatch):
    monkeypatch.setattr(
        schedule_batch, "get_server_args", lambda: SimpleNamespace(enable_rotatek=True)
    )


def padded(item: MultimodalDataItem) -> MultimodalDataItem:
    schedule_batch.set_pad_value(MultimodalDataItem.set_pad_value, item)
    return item


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (
            {"image_grid_thw": torch.tensor([[1, 24, 48]])},
            {"image_grid_thw": torch.tensor([[1, 48, 24]])},
        ),
        (
            {"video_grid_thw": torch.tensor([[2, 24, 48]])},
            {"video_grid_thw": torch.tensor([[4, 24, 24]])},
        ),
        ({"image_sizes": [(672, 336)]}, {"image_sizes": [(336, 672)]}),
    ],
)
def test_blank_pictures_of_other_shape_are_two(rotatek_is_on, first, second):
    blank = torch.ones(1152, 4)
    one, other, again = (padded(image(blank, **data)) for data in (first, second, first))
    assert one.hash == again.hash and one.pad_values == again.pad_values
    assert one.hash != other.hash and not set(one.pad_values) & set(other.pad_values)
    assert len(set(one.pad_values)) == 4 and one.pad_value == one.pad_values[0]


def test_the_shape_of_the_features_is_part_of_the_key(rotatek_is_on):
    assert padded(image(np.ones((1, 3, 2, 8)))).hash != padded(image(np.ones((1, 3, 8, 2)))).hash


def test_a_key_that_the_client_gave_stays(rotatek_is_on):
    item = image(torch.ones(2), image_grid_thw=torch.tensor([[1, 2, 2]]))
    item.hash = 77
    assert padded(item).hash == 77
    item.set_hash(78)
    assert padded(item).hash == 78


def test_what_does_not_tell_how_features_lie_is_no_part_of_the_key(rotatek_is_on):
    assert (
        padded(image(torch.ones(2), feature_borrowed=True)).hash
        == padded(image(torch.ones(2))).hash
    )
