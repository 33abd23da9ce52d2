"""The training script: batches that say what they are meant to, and a run that goes on where it
stopped."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_tiny_vlm
from pruned_reader import SELECTORS, PrunedReader
from tasks import FAMILIES, HELD_OUT_SEED, SIZES, make_picture
from train_tiny_vlm import (
    VALIDATION_SEED,
    Batches,
    Losses,
    Plan,
    Tally,
    learning_rate_at,
    parse,
    train,
)
from vlm_models import READERS

SCRIPT = Path(__file__).parents[1] / "scripts" / "models" / "train_tiny_vlm.py"
PLAN = Plan(seed=1, steps=100, batch_size=4, text_length=256, easy_part=0.25, square_part=0.5)


@pytest.fixture(scope="module", params=sorted(READERS))
def reader(request):
    torch.manual_seed(0)
    return READERS[request.param].build()


def test_a_batch_teaches_the_answers_and_nothing_else(reader):
    batch = Batches(reader, PLAN, 0).batch(60)
    end = reader.tokenizer.eos_token
    answers = []
    for row, numbers in zip(batch["ids"], batch["answers"], strict=True):
        answers += [
            reader.tokenizer.decode(row[numbers == number]) for number in numbers.unique()[1:]
        ]
    assert len(answers) == len(batch["kinds"]) and all(text.endswith(end) for text in answers)
    size = PLAN.size(60)
    first = make_picture(
        batch["kinds"][0][0], PLAN.seed * PLAN.steps * 1000 + 60 * 1000, size, questions=8
    )
    assert [text.removesuffix(end) for text in answers[:2]] == [
        question.answer for question in first.questions[:2]
    ]
    assert [length for _, _, length in batch["kinds"]] == [
        len(reader.tokenizer.encode(text.removesuffix(end))) for text in answers
    ]


def test_batches_depend_on_their_number_alone_and_grow_harder():
    reader = READERS["qwen2_5_vl"].build()
    again = [Batches(reader, PLAN, start).batch(7) for start in (0, 5)]
    assert all(
        torch.equal(again[0][name], again[1][name])
        for name in ("pictures", "ids", "answers", "glyphs")
    )
    assert PLAN.level(0) < PLAN.level(20) < PLAN.level(30) == 1.0
    assert (
        {PLAN.size(step) for step in range(50)}
        == {SIZES[0]}
        < {PLAN.size(step) for step in range(50, 100)}
    )
    assert PLAN.rows(SIZES[-1]) < PLAN.rows(SIZES[0]) == 4


def test_training_never_draws_the_pictures_of_an_evaluation():
    largest = Plan(
        seed=8, steps=50_000, batch_size=900, text_length=256, easy_part=0, square_part=0
    )
    assert (largest.seed + 1) * largest.steps * 1000 < VALIDATION_SEED < HELD_OUT_SEED


def test_an_answer_counts_as_right_only_if_every_token_is(reader):
    batch = Batches(reader, PLAN, 0).batch(0)
    wanted = torch.nn.functional.one_hot(batch["ids"].roll(-1, 1), len(reader.tokenizer)).float()

    class Oracle:
        def forward(self, pictures, ids):
            return wanted, torch.zeros(*batch["things"].shape, 512)

    losses = Losses()
    _, _, right = losses(Oracle(), batch)
    assert right.all() and len(right) == len(batch["kinds"])
    row, at = (batch["answers"] == 2).nonzero()[0].tolist()
    wanted[row, at - 1] = wanted[row, at - 1].roll(1)
    _, _, right = losses(Oracle(), batch)
    assert right.tolist() == [number != 2 for number in range(1, len(right) + 1)]
    tally = Tally()
    tally.add([("charts", "list", 40), ("charts", "value", 2)], torch.tensor([True, False]))
    assert tally.rates() == {
        "charts": 0.5,
        "charts, 30 tokens and more": 1.0,
        "charts/list": 1.0,
        "charts/value": 0.0,
    }


def test_the_learning_rate_warms_up_holds_and_falls_to_zero():
    arguments = argparse.Namespace(learning_rate=1.0, warmup_steps=10, steps=100, decay_part=0.3)
    rates = [learning_rate_at(step, arguments) for step in range(101)]
    assert (
        rates[0] == 0.1
        and rates[10:70] == [1.0] * 60
        and rates[85] == pytest.approx(0.5)
        and rates[100] == 0
    )


def test_a_run_is_resumed_and_leaves_a_checkpoint(tmp_path):
    command = [
        sys.executable,
        str(SCRIPT),
        "--backbone",
        "llava_next",
        "--out",
        str(tmp_path),
        "--workers",
        "0",
    ]
    command += [
        "--batch-size",
        "1",
        "--validation-pictures",
        "1",
        "--square-part",
        "1",
        "--allow-cpu",
    ]
    started = subprocess.run(
        [*command, "--steps", "1"], capture_output=True, text=True, timeout=280
    )
    assert started.returncode == 0, started.stderr[-2000:]
    resumed = subprocess.run(
        [*command, "--steps", "2"], capture_output=True, text=True, timeout=280
    )
    assert resumed.returncode == 0 and "at step 1" in resumed.stdout, resumed.stderr[-2000:]
    summary = json.loads((tmp_path / "training.json").read_text())
    assert [entry["step"] for entry in summary["history"]] == [1, 2]
    assert (tmp_path / "model.safetensors.index.json").exists() and (tmp_path / "loss.png").exists()
    other = subprocess.run(
        [*command, "--backbone", "qwen2_5_vl"], capture_output=True, text=True, timeout=280
    )
    assert other.returncode == 1 and "state.pt is of llava_next, not qwen2_5_vl" in other.stderr


def test_a_stage_with_fewer_tokens_goes_on_from_a_reader(tmp_path, models, monkeypatch):
    monkeypatch.setattr(train_tiny_vlm, "SIZES", SIZES[:1])
    flags = [
        "--backbone",
        "llava_next",
        "--out",
        str(tmp_path),
        "--init",
        str(models["reader_llava_next"]),
        "--prune",
        "0.2",
    ]
    flags += [
        "--steps",
        "1",
        "--batch-size",
        "1",
        "--validation-pictures",
        "1",
        "--easy-part",
        "0",
        "--square-part",
        "1",
    ]
    train(parse([*flags, "--warmup-steps", "1000", "--workers", "0", "--allow-cpu"]))
    summary = json.loads((tmp_path / "training.json").read_text())
    assert [entry["step"] for entry in summary["history"]] == [1] and (
        tmp_path / "state.pt"
    ).exists()
    # It reads as before, with all tokens, and worse with a few.
    whole, few = (
        summary["held-out exact match, answers before given"],
        summary["the same with 35% of the visual tokens"],
    )
    assert (
        min(whole[family] for family in FAMILIES)
        > 0.9
        > sum(few[family] for family in FAMILIES) / 3
    )


def test_a_share_that_keeps_nothing_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"--prune must be in \(0, 1\], got 0.0"):
        train(
            parse(
                [
                    "--backbone",
                    "llava_next",
                    "--out",
                    str(tmp_path),
                    "--prune",
                    "0",
                    "--steps",
                    "1",
                    "--allow-cpu",
                ]
            )
        )


def test_shares_and_choices_of_batches_are_drawn_by_their_number():
    plan = dataclasses.replace(PLAN, least_share=0.2)
    reader = argparse.Namespace(tokenizer=None, chat=None)
    drawn = [plan.pruned(reader, step) for step in range(200)]
    shares = [pruned.share for pruned in drawn]
    assert shares == [plan.pruned(reader, step).share for step in range(200)]
    assert min(shares) < 0.25 and max(shares) > 0.95 and all(0.2 <= share <= 1 for share in shares)
    assert {pruned.selector for pruned in drawn} == set(SELECTORS)
    assert PLAN.pruned(reader, 3) is reader


@torch.no_grad()
def test_a_pruned_batch_keeps_distinct_tokens_in_order(reader):
    tokens = reader.image_tokens(SIZES[0])
    visual = torch.randn(3, tokens.num_tokens, 16)
    visual[:, 30:70] = visual[:, 29:30]  # paper
    for selector in SELECTORS:
        kept = PrunedReader(reader, 0.3, selector).choose(visual, tokens)
        assert (kept.diff() > 0).all() and kept.shape[1] == sum(tokens.of_share(0.3)) + len(
            tokens.fixed
        )
