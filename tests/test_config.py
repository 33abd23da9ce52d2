import dataclasses

import pytest

from sglang_rotatek.config import RotateKConfig, RotateKError
from sglang_rotatek.kernels.row_format import RowFormat


def test_defaults_are_coded_rows_of_a_pca_with_one_segment_an_image():
    config = RotateKConfig()
    assert config.row_format(128, 128) == RowFormat(16, 4, 4)
    assert config.basis == "pca"
    assert config.segment_tokens is None


def test_the_papers_rows_keep_a_quarter_of_the_channels():
    assert RotateKConfig(key_bits=16).row_format(128, 128) == RowFormat(32, 16, 16)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RotateKConfig().keep_ratio = 0.5


@pytest.mark.parametrize(
    ("fields", "flag", "got"),
    [
        ({"key_bits": 16, "keep_ratio": 0.0}, "--rotatek-keep-ratio", "0.0"),
        ({"key_bits": 16, "keep_ratio": -0.25}, "--rotatek-keep-ratio", "-0.25"),
        ({"key_bits": 16, "keep_ratio": 1.01}, "--rotatek-keep-ratio", "1.01"),
        ({"key_bits": 16, "basis": "svd"}, "--rotatek-basis", "'svd'"),
        ({"visual_fraction": 0.0}, "--rotatek-visual-fraction", "0.0"),
        ({"visual_fraction": 1.0}, "--rotatek-visual-fraction", "1.0"),
        ({"min_image_tokens": 0}, "--rotatek-min-image-tokens", "0"),
        ({"segment_tokens": 63}, "--rotatek-segment-tokens", "63"),
    ],
    ids=lambda value: (
        "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else ""
    ),
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
    [
        (0.125, 128, 16),
        (0.5, 128, 64),
        (1.0, 128, 128),
        (0.25, 64, 16),
        (0.2, 80, 16),
        (1.0, 80, 80),
    ],
)
def test_rank_is_the_ratio_of_head_dim(keep_ratio, head_dim, rank):
    result = RotateKConfig(key_bits=16, keep_ratio=keep_ratio).row_format(head_dim, 64).rank
    assert result == rank
    assert isinstance(result, int)


@pytest.mark.parametrize(
    ("keep_ratio", "head_dim"),
    [(0.3, 128), (0.0625, 128), (0.25, 80), (0.25, 96)],
    ids=["not-whole", "below-16", "20-channels", "24-channels"],
)
def test_a_rank_that_is_no_multiple_of_16_is_refused_with_the_ratios_that_fit(keep_ratio, head_dim):
    with pytest.raises(
        RotateKError, match=f"ratios that fit this model: {16 / head_dim:g}, {32 / head_dim:g}"
    ):
        RotateKConfig(key_bits=16, keep_ratio=keep_ratio).row_format(head_dim, 64)


def test_every_ratio_named_by_the_error_is_accepted():
    with pytest.raises(RotateKError) as error:
        RotateKConfig(key_bits=16, keep_ratio=0.3).row_format(128, 128)
    named = str(error.value).rsplit(": ", 1)[1].rstrip(".").split(", ")
    assert [
        RotateKConfig(key_bits=16, keep_ratio=float(ratio)).row_format(128, 128).rank
        for ratio in named
    ] == list(range(16, 129, 16))


def test_a_head_too_narrow_for_any_rank_is_refused():
    with pytest.raises(RotateKError, match="ratios that fit this model: none"):
        RotateKConfig(key_bits=16, keep_ratio=1.0).row_format(8, 8)


@pytest.mark.parametrize(
    ("fields", "row"),
    [
        ({}, (16, 4, 4)),
        ({"key_bits": 16, "value_bits": 4}, (32, 16, 4)),
        ({"key_bits": 4}, (16, 4, 4)),
        ({"key_bits": 2, "value_bits": 8}, (16, 2, 8)),
        ({"key_bits": 4, "head_channels": 32}, (32, 4, 4)),
    ],
)
def test_the_rows_that_flags_ask_for(fields, row):
    assert RotateKConfig(**fields).row_format(128, 128) == RowFormat(*row)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"key_bits": 3}, "--rotatek-key-bits must be one of 16, 4, 2, got 3"),
        ({"value_bits": 1}, "--rotatek-value-bits must be one of 16, 8, 4, 2, got 1"),
        ({"key_bits": 4, "keep_ratio": 0.25}, "--rotatek-keep-ratio 0.25 is of the paper's rows"),
        ({"key_bits": 2, "basis": "think"}, "--rotatek-basis think is of the paper's rows"),
        ({"key_bits": 16, "head_channels": 32}, "--rotatek-head-channels 32 is of coded Keys"),
        ({"key_bits": 16, "max_error": 0.1}, "--rotatek-max-error 0.1 is of coded Keys"),
        ({"max_error": 0.0}, "--rotatek-max-error must be above 0, got 0.0"),
    ],
)
def test_flags_of_the_other_kind_of_rows_are_refused(fields, message):
    with pytest.raises(RotateKError, match=message):
        RotateKConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "dims", "message"),
    [
        (
            {"key_bits": 4},
            (72, 72),
            "needs head dims that are multiples of 16, got 72 for Keys and 72",
        ),
        (
            {"key_bits": 16, "value_bits": 4},
            (64, 72),
            "needs head dims that are multiples of 16, got 64 for Keys and 72",
        ),
        (
            {"key_bits": 4, "head_channels": 24},
            (128, 128),
            "multiple of 16 up to head_dim 128, got 24",
        ),
        (
            {"key_bits": 4, "head_channels": 80},
            (64, 64),
            "multiple of 16 up to head_dim 64, got 80",
        ),
    ],
)
def test_a_model_that_rows_do_not_fit_is_refused(fields, dims, message):
    with pytest.raises(RotateKError, match=message):
        RotateKConfig(**fields).row_format(*dims)


def test_models_whose_tokens_cannot_be_pruned_are_refused_by_name():
    RotateKConfig(keep_tokens=0.5).check_prunable("LlavaNextForConditionalGeneration")
    RotateKConfig(token_pruner="visionzip").check_prunable("InternVLChatModel")  # nothing is pruned
    with pytest.raises(RotateKError, match="got InternVLChatModel; drop it"):
        RotateKConfig(keep_tokens=0.5).check_prunable("InternVLChatModel")
    by_attention = RotateKConfig(keep_tokens=0.5, token_pruner="visionzip")
    by_attention.check_prunable("LlavaNextForConditionalGeneration")
    with pytest.raises(RotateKError, match="got Qwen3VLForConditionalGeneration; take divprune"):
        by_attention.check_prunable("Qwen3VLForConditionalGeneration")
