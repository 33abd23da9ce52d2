import dataclasses

import pytest

from sglang_rotatek.config import RotateKConfig, RotateKError


def test_defaults_keep_a_quarter_of_the_channels_with_pca():
    config = RotateKConfig()
    assert config.rank(head_dim=128) == 32
    assert config.basis == "pca"
    assert config.segment_tokens is None


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RotateKConfig().keep_ratio = 0.5


@pytest.mark.parametrize(
    ("fields", "flag", "got"),
    [
        ({"keep_ratio": 0.0}, "--rotatek-keep-ratio", "0.0"),
        ({"keep_ratio": -0.25}, "--rotatek-keep-ratio", "-0.25"),
        ({"keep_ratio": 1.01}, "--rotatek-keep-ratio", "1.01"),
        ({"basis": "svd"}, "--rotatek-basis", "'svd'"),
        ({"visual_fraction": 0.0}, "--rotatek-visual-fraction", "0.0"),
        ({"visual_fraction": 1.0}, "--rotatek-visual-fraction", "1.0"),
        ({"min_image_tokens": 0}, "--rotatek-min-image-tokens", "0"),
        ({"segment_tokens": 63}, "--rotatek-segment-tokens", "63"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_bad_field_is_refused_with_the_flag_and_the_value(fields, flag, got):
    with pytest.raises(RotateKError) as error:
        RotateKConfig(**fields)
    assert str(error.value).startswith(flag)
    assert f"got {got}" in str(error.value)


def test_segments_may_be_as_short_as_the_shortest_image():
    assert RotateKConfig(min_image_tokens=48, segment_tokens=48).segment_tokens == 48


@pytest.mark.parametrize(
    ("keep_ratio", "head_dim", "rank"),
    [(0.125, 128, 16), (0.5, 128, 64), (1.0, 128, 128), (0.25, 64, 16), (0.2, 80, 16), (1.0, 80, 80)],
)
def test_rank_is_the_ratio_of_head_dim(keep_ratio, head_dim, rank):
    result = RotateKConfig(keep_ratio=keep_ratio).rank(head_dim)
    assert result == rank
    assert isinstance(result, int)


@pytest.mark.parametrize(
    ("keep_ratio", "head_dim"),
    [(0.3, 128), (0.0625, 128), (0.25, 80), (0.25, 96)],
    ids=["not-whole", "below-16", "20-channels", "24-channels"],
)
def test_a_rank_that_is_no_multiple_of_16_is_refused_with_the_ratios_that_fit(keep_ratio, head_dim):
    with pytest.raises(RotateKError, match=f"ratios that fit this model: {16 / head_dim:g}, {32 / head_dim:g}"):
        RotateKConfig(keep_ratio=keep_ratio).rank(head_dim)


def test_every_ratio_named_by_the_error_is_accepted():
    with pytest.raises(RotateKError) as error:
        RotateKConfig(keep_ratio=0.3).rank(128)
    named = str(error.value).rsplit(": ", 1)[1].rstrip(".").split(", ")
    assert [RotateKConfig(keep_ratio=float(ratio)).rank(128) for ratio in named] == list(range(16, 129, 16))


def test_a_head_too_narrow_for_any_rank_is_refused():
    with pytest.raises(RotateKError, match="ratios that fit this model: none"):
        RotateKConfig(keep_ratio=1.0).rank(8)
