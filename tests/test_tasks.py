"""The generator of picture questions: reproducible, and its answers follow from what is drawn."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks import FAMILIES, HELD_OUT_SEED, NUM_THINGS, SIZES, make_picture
from tasks.canvas import CELL_HEIGHT, CELL_WIDTH, CHARACTERS, TOKEN
from tasks.scenes import COLORS, SHAPES

SEEDS = range(200)
ALL = 10**6  # more questions than any picture has
each_family = pytest.mark.parametrize("family", FAMILIES)


def rows_of(picture) -> list[str]:
    return ["".join(CHARACTERS[index] for index in row) for row in picture.glyphs]


def words(text: str) -> list[str]:
    return re.findall(r"[^\s,]+", text)


def drawn_things(picture) -> Counter:
    """(color, shape) -> number, from the dense targets."""
    kinds = (picture.things[picture.things > 0].astype(int) - 1) // 3
    names = sorted(COLORS)
    return Counter((names[kind % len(names)], SHAPES[kind // len(names)]) for kind in kinds)


@each_family
def test_the_same_seed_is_the_same_picture(family):
    for seed in (0, HELD_OUT_SEED):
        one, two = make_picture(family, seed), make_picture(family, seed)
        assert np.array_equal(np.asarray(one.image), np.asarray(two.image))
        assert one.questions == two.questions
        assert np.array_equal(one.glyphs, two.glyphs) and np.array_equal(one.things, two.things)


@each_family
def test_another_seed_is_another_picture(family):
    pictures = [make_picture(family, seed).image.tobytes() for seed in SEEDS]
    assert len(set(pictures)) == len(SEEDS)


@each_family
def test_asking_more_does_not_change_the_picture(family):
    one, two = make_picture(family, 5, questions=1), make_picture(family, 5, questions=8)
    assert one.image.tobytes() == two.image.tobytes()
    assert one.questions == two.questions[:1]


@settings(max_examples=200, deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    seed=st.integers(0, 2 * HELD_OUT_SEED),
    size=st.sampled_from([None, *SIZES]),
    level=st.floats(0, 1),
)
def test_every_family_size_and_level_can_be_drawn(family, seed, size, level):
    picture = make_picture(family, seed, size, questions=3, level=level)
    width, height = picture.image.size
    assert (width, height) in (SIZES if size is None else [size])
    assert picture.glyphs.shape == (height // CELL_HEIGHT, width // CELL_WIDTH)
    assert picture.things.shape == (height // TOKEN, width // TOKEN)
    assert picture.glyphs.max() < len(CHARACTERS)
    assert picture.things.max() < NUM_THINGS
    assert 1 <= len(picture.questions) <= 3
    # Of a chart with few items, the two differences may be of one pair.
    texts = [question.text for question in picture.questions if question.kind != "difference"]
    assert len(set(texts)) == len(texts)
    for question in picture.questions:
        assert question.answer == question.answer.strip() != ""
        computed = "=" if question.kind == "difference" else ""  # never drawn
        assert set(question.answer) <= set(CHARACTERS + "\n" + computed)


@each_family
def test_three_turns_of_every_held_out_picture_have_a_question(family):
    assert all(len(make_picture(family, HELD_OUT_SEED + seed).questions) == 3 for seed in SEEDS)


def test_a_question_of_a_picture_has_one_answer():
    for family in FAMILIES:
        for seed in SEEDS:
            answers: dict[str, str] = {}
            for question in make_picture(family, seed, questions=ALL).questions:
                assert answers.setdefault(question.text, question.answer) == question.answer


def test_every_line_of_an_answer_about_a_document_stands_in_one_row():
    for seed in SEEDS:
        picture = make_picture("documents", seed, questions=ALL)
        rows = [set(words(row)) for row in rows_of(picture)]
        for question in picture.questions:
            for line in question.answer.split("\n"):
                assert any(row.issuperset(words(line)) for row in rows), question


def test_every_item_and_value_of_a_chart_stands_on_it():
    for seed in SEEDS:
        picture = make_picture("charts", seed, questions=ALL)
        shown = {word for row in rows_of(picture) for word in words(row)}
        for question in picture.questions:
            read, _, _ = question.answer.partition(" = ")
            assert shown.issuperset(set(words(read)) - {"-"}), question


def test_the_answers_about_a_chart_agree_with_its_list():
    for seed in SEEDS:
        questions = make_picture("charts", seed, questions=ALL).questions
        listed = next(question.answer for question in questions if question.kind == "list")
        values = {label: int(number) for label, number in map(str.split, listed.split(", "))}
        for question in questions:
            asked = [word for word in words(question.text.rstrip("?.")) if word in values]
            if question.kind == "largest":
                assert question.answer == max(values, key=values.get)
            elif question.kind == "smallest":
                assert question.answer == min(values, key=values.get)
            elif question.kind == "value":
                assert int(question.answer) == values[asked[-1]]
            elif question.kind == "difference":
                more, less = values[asked[-2]], values[asked[-1]]
                assert question.answer == f"{more} - {less} = {more - less}"
                assert more > less


def test_the_answers_about_a_scene_agree_with_its_shapes():
    for seed in SEEDS:
        picture = make_picture("scenes", seed, questions=ALL)
        things = drawn_things(picture)
        colors, shapes = Counter(), Counter()
        for (color, shape), number in things.items():
            colors[color] += number
            shapes[shape] += number
        for question in picture.questions:
            asked = words(question.text.rstrip("?."))
            if question.kind == "count color":
                assert int(question.answer) == colors[asked[2]]
            elif question.kind == "count shape":
                shape = "cross" if asked[2] == "crosses" else asked[2].removesuffix("s")
                assert int(question.answer) == shapes[shape]
            elif question.kind == "color":
                assert things[question.answer, asked[-1]] == shapes[asked[-1]] == 1
            elif question.kind in ("height", "side"):
                assert things[asked[-2], asked[-1]] == 1
            elif question.kind == "list":
                listed = [tuple(item.split()[1:]) for item in question.answer.split(", ")]
                assert Counter(listed) == things


@pytest.mark.parametrize(("family", "length"), [("documents", 60), ("charts", 60), ("scenes", 30)])
def test_a_family_has_long_answers(family, length):
    lengths = [
        len(q.answer)
        for seed in SEEDS
        for q in make_picture(family, HELD_OUT_SEED + seed).questions
    ]
    assert max(lengths) >= length
    assert sum(n >= 30 for n in lengths) >= 10
    # The server's limit of scripts/eval/eval_vlm.py.
    assert max(lengths) < 256


def test_unknown_families_and_sizes_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'maps', expected one of documents, charts, scenes"):
        make_picture("maps", 1)
    with pytest.raises(ValueError, match="expected one of .672, 672"):
        make_picture("charts", 1, size=(100, 100))
