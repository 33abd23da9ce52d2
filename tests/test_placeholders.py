"""What a request says of its pictures, held against what was made of them; no model and no host."""

import re

import pytest

from sglang_rotatek.requests.placeholders import (
    Medium,
    as_plain_text,
    check_boundaries,
    check_lengths,
    check_media,
    check_numbers,
    check_placeholders,
    check_token_ids,
    runs_of,
    with_single_placeholders,
)

PAD, VIDEO_PAD = 7, 8
QWEN = {"<|vision_start|>", "<|image_pad|>", "<|vision_end|>"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("what is <|image_pad|>?", "what is < |image_pad|>?"),
        (
            "<|vision_start|><|image_pad|><|vision_end|>",
            "< |vision_start|>< |image_pad|>< |vision_end|>",
        ),
        ("an <image> tag", "an < image> tag"),
        ("<|image_pad|", "<|image_pad|"),
        ("a < b", "a < b"),
        ("", ""),
    ],
)
def test_a_quoted_placeholder_becomes_text_and_all_else_stays(text, expected):
    patterns = [re.compile(r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|<image>")]
    plain = as_plain_text(text, QWEN, patterns)
    assert plain == expected
    assert as_plain_text(plain, QWEN, patterns) == plain


def test_the_longer_of_two_placeholders_that_begin_alike_is_found():
    assert as_plain_text("<img><img2>", {"<img", "<img2>"}) == "< img>< img2>"


@pytest.mark.parametrize(
    ("ids", "runs"),
    [
        ([], []),
        ([1, 2], []),
        ([7], [(0, 0)]),
        ([7, 7, 1, 7], [(0, 1), (3, 3)]),
        ([1, 7, 7], [(1, 2)]),
    ],
)
def test_runs_of_a_token(ids, runs):
    assert runs_of(ids, PAD) == runs


def test_expanded_pictures_are_one_placeholder_each():
    assert with_single_placeholders([1, 7, 7, 7, 2, 7, 7, 3], PAD, 2) == [1, 7, 2, 7, 3]


@pytest.mark.parametrize(
    ("ids", "pictures"), [([1, 7, 2], 1), ([1, 7, 7, 2], 2), ([1, 7, 7, 2], 0), ([1, 2], 1)]
)
def test_a_prompt_that_is_not_expanded_stays(ids, pictures):
    assert with_single_placeholders(ids, PAD, pictures) is ids


def test_an_expanded_picture_of_another_length_is_named():
    check_lengths([(1, 4)], [(9, 12)])
    with pytest.raises(ValueError, match="picture 2 makes 4 tokens, but the prompt has 3"):
        check_lengths([(0, 0), (2, 4)], [(0, 0), (2, 5)])


@pytest.mark.parametrize("ids", [[0, 99], [5], []])
def test_token_ids_that_the_model_has(ids):
    check_token_ids(ids, 100)


@pytest.mark.parametrize(
    ("ids", "bad"), [([5, 100], 100), ([-1, 5], -1), ([1_000_007] * 3, 1_000_007)]
)
def test_a_token_id_that_the_model_lacks_is_named(ids, bad):
    with pytest.raises(
        ValueError, match=f"input_ids holds {bad}, but the model knows the ids 0 to 99"
    ):
        check_token_ids(ids, 100)


def test_more_placeholders_than_inputs_are_named():
    check_numbers({"image": 1, "video": 0}, {"image": 2, "video": 0, "audio": 0})
    with pytest.raises(
        ValueError, match=r"the prompt has 1 video placeholder\(s\) for 0 video input"
    ):
        check_numbers({"image": 1, "video": 1}, {"image": 1, "video": 0})


@pytest.mark.parametrize(
    ("media", "given"),
    [
        ([], {"image": 0, "video": 0}),
        ([Medium("image", [(1, 4)]), Medium("image", [(6, 9)])], {"image": 2}),
        ([Medium("image", [(1, 4), (6, 9)])], {"image": 2}),  # one item for all
        ([Medium("image", [(1, 4), (6, 9)])], {"image": 1}),  # a picture in rows or slices
        ([Medium("image", None), Medium("image", None)], {"image": 2}),
        ([Medium("video", [(1, 4)]), Medium("image", [(6, 9)])], {"image": 1, "video": 1}),
        ([Medium("video", [(1, 4)])], {"image": 0, "video": 2}),
    ],
)
def test_everything_that_was_sent_came_out(media, given):
    check_media(media, given)


@pytest.mark.parametrize(
    ("media", "given", "message"),
    [
        (
            [],
            {"image": 1},
            r"got 1 image input\(s\), but the prompt or the model has a place for 0",
        ),
        ([Medium("image", None)], {"image": 2}, r"got 2 image input\(s\).* for 1"),
        ([Medium("image", [(1, 4)])], {"image": 1, "video": 1}, r"got 1 video input\(s\)"),
        ([Medium("image", [(1, 4)])], {"image": 1, "audio": 2}, r"got 2 audio input\(s\)"),
        ([Medium("video", [(1, 4)])], {"image": 1}, r"got 1 image input\(s\)"),
    ],
)
def test_what_was_left_out_silently_is_named(media, given, message):
    with pytest.raises(ValueError, match=message):
        check_media(media, given)


@pytest.mark.parametrize(
    ("ids", "media"),
    [
        ([1, 7, 7, 2], [Medium("image", [(1, 2)])]),
        ([1, 7, 2, 7], [Medium("image", None), Medium("image", None)]),
        ([1, 8, 8, 3, 8, 8, 7], [Medium("video", [(1, 2), (4, 5)]), Medium("image", [(6, 6)])]),
    ],
)
def test_each_placeholder_has_its_picture(ids, media):
    check_placeholders(ids, media, {"image": PAD, "video": VIDEO_PAD})


@pytest.mark.parametrize(
    ("ids", "media", "message"),
    [
        ([7, 1, 7, 7], [Medium("image", [(2, 3)])], r"\+1 image placeholder"),
        ([1, 8, 7], [Medium("image", [(2, 2)])], r"\+1 video placeholder"),
        ([1, 7, 7], [Medium("image", None)], r"\+1 image placeholder"),
        ([1, 2], [Medium("image", None)], r"-1 image placeholder"),
    ],
)
def test_a_placeholder_without_a_picture_is_named(ids, media, message):
    with pytest.raises(ValueError, match=message):
        check_placeholders(ids, media, {"image": PAD, "video": VIDEO_PAD})


START, END = 5, 6


@pytest.mark.parametrize(
    ("ids", "spans"),
    [
        ([START, 7, 7, END, 1], [(1, 2)]),
        ([START, 7, END, START, 8, END], [(1, 1), (4, 4)]),
        ([START, 7, END, 1, 7, 7], [(1, 1), (4, 5)]),  # slices have tokens of their own
        ([1, 2], []),
    ],
)
def test_each_picture_is_begun_and_ended(ids, spans):
    check_boundaries(ids, [Medium("image", spans)], START, END)


@pytest.mark.parametrize(
    ("ids", "position"),
    [
        ([START, 1, START, 7, 7, END], 0),
        ([1, END, START, 7, 7, END], 1),
        ([START, START, START, 7, 7, END], 0),
    ],
)
def test_the_end_or_beginning_of_no_picture_is_named(ids, position):
    first = ids.index(7)
    with pytest.raises(ValueError, match=f"at position {position}, where none is"):
        check_boundaries(ids, [Medium("image", [(first, first + 1)])], START, END)
