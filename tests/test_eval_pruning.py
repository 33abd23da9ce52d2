"""eval_pruning.py: bytes are the layout's, positions the server's, and what keeps everything
changes nothing."""

from __future__ import annotations

import json

import eval_pruning
import numpy as np
import pruning_report
import pytest
import torch
from eval_pruning import ALL, Evaluation, Plan
from fidelity_models import Checkpoint
from image_tokens import NEWLINE, grid_tokens, tiled_tokens
from in_llm_pruners import attention_to_image, fastv, pyramid_drop, read_with_stages, run_layer
from pruned_prompts import image_tokens, is_right, kept_positions, make_chat, read_answers
from pruned_reader import PrunedReader
from pruning_budget import FULL, Budget, row_format
from pruning_choice import Chooser, answer_squares, ink_first, ink_of, recalls
from pruning_report import Reading, summary, table
from tasks import HELD_OUT_SEED, SIZES, make_picture
from test_pruning import Prompt
from visionzip_scores import TowerScores
from vlm_models import READERS, Reader

from sglang_rotatek.config import RotateKConfig
from sglang_rotatek.memory.layout import KVShape, layout_of_bytes
from sglang_rotatek.pruning.layouts import GridLayout
from sglang_rotatek.pruning.pruner import Pruner
from sglang_rotatek.pruning.selectors import divprune
from sglang_rotatek.pruning.shrink import shrink
from sglang_rotatek.stats import Stats

BACKBONES = ("qwen2_5_vl", "llava_next")
LOGIT_ATOL = 2e-3  # fp32, of logits that reach about 30


@pytest.fixture(scope="module")
def picture():
    return make_picture("documents", HELD_OUT_SEED + 3, SIZES[0])


@pytest.fixture(scope="module", params=BACKBONES)
def chat(request, models, picture):
    """A trained checkpoint and a chat about the picture."""
    checkpoint = Checkpoint(models[f"reader_{request.param}"])
    with torch.inference_mode():
        return checkpoint, make_chat(checkpoint, picture)


class Sizes:
    num_layers, num_kv_heads, head_dim = 4, 2, 128


@pytest.mark.parametrize("form", ["rank64", "rank32", "rank16", "16+z4/z4", "16+z2/z2"])
def test_bytes_of_a_narrow_format_are_those_of_the_layout(form):
    """So many images fit a pool of the layout, and no more."""
    shape = KVShape(4, 2, 128, 128, row_format(form), 2, 2)
    stock = 576 * shape.full_row_bytes
    for share in eval_pruning.BUDGETS:
        kept = Budget(Sizes).most_tokens(form, share, 576)
        pool = layout_of_bytes(100 * int(share * stock), RotateKConfig(), shape)
        assert 100 * pool.slabs_of(kept) <= pool.num_slabs
        assert kept == 576 or 100 * pool.slabs_of(kept + 1) > pool.num_slabs
        used = Budget(Sizes).share(form, kept, 576)
        assert (
            used == pytest.approx(pool.slabs_of(kept) * shape.slab_bytes / stock) and used <= share
        )
        assert Budget(Sizes).ideal_share(form, kept, 576) < used


def test_budgets_of_rank_32_are_the_ones_counted_by_hand():
    kept = [Budget(Sizes).most_tokens("rank32", share, 576) / 576 for share in eval_pruning.BUDGETS]
    assert kept == pytest.approx([0.944, 0.722, 0.5, 0.389, 0.278, 0.167], abs=5e-4)
    assert (
        Budget(Sizes).most_tokens(FULL, 0.35, 576) == 201
        and Budget(Sizes).share(FULL, 201, 576) <= 0.35
    )


@pytest.mark.parametrize("form", ["int4", "16+z3/z4", "16+h4/int4"])
def test_a_format_that_no_server_stores_is_refused(form, capsys):
    with pytest.raises(SystemExit):
        eval_pruning.parse(["model", "--formats", form])
    assert "a format of rows must be" in capsys.readouterr().err


def test_quotas_fill_what_they_may():
    grid = grid_tokens(24, 24)
    assert [grid.quotas(most) for most in (1, 201, 575, 576, 900)] == [
        (1,),
        (201,),
        (575,),
        (576,),
        (576,),
    ]
    tiles = tiled_tokens(torch.tensor([0] * 16 + ([1] * 4 + [2] * 3 + [NEWLINE]) * 3))
    assert [len(part) for part in tiles.parts] == [16, 12, 9] and len(tiles.fixed) == 3
    assert tiles.quotas(5) is None and tiles.quotas(40) == (16, 12, 9)
    for most in range(6, 40):
        assert most - 3 < 3 + sum(tiles.quotas(most)) <= most


def reader_of(checkpoint: Checkpoint) -> Reader:
    """The reader of training with the checkpoint's weights."""
    kind = next(kind for kind in READERS.values() if kind.keeps_positions == checkpoint.has_mrope)
    return kind(checkpoint.model, checkpoint.tokenizer)


@pytest.mark.parametrize("size", SIZES[1:3], ids=str)
@torch.inference_mode()
def test_tokens_lie_where_the_reader_put_them(chat, size):
    """The model's own packing against the reader's order of training."""
    checkpoint, _ = chat
    inputs, _ = checkpoint.render(make_picture("charts", HELD_OUT_SEED, size))
    found, expected = image_tokens(checkpoint, inputs), reader_of(checkpoint).image_tokens(size)
    assert found.num_tokens == int((inputs["input_ids"] == checkpoint.image_token).sum())
    assert torch.equal(found.grid, expected.grid) and torch.equal(found.fixed, expected.fixed)
    assert found.grid.shape == (size[1] // 28, size[0] // 28)
    assert len(found.parts) == len(expected.parts) and all(
        map(torch.equal, found.parts, expected.parts)
    )


def test_an_answers_squares_are_those_under_its_characters(picture):
    lines = picture.glyphs
    found = {
        question.text: answer_squares(picture, question.answer) for question in picture.questions
    }
    assert any(squares is not None for squares in found.values())
    for squares in found.values():
        if squares is not None:
            assert (
                squares.any()
                and not (
                    squares & ~torch.from_numpy(lines.reshape(len(lines), -1, 2).any(-1))
                ).any()
            )
    assert answer_squares(picture, "no such words") is None and answer_squares(picture, "#") is None


def test_the_oracle_keeps_every_answer_once_it_may_keep_the_ink(chat, picture):
    checkpoint, whole = chat
    chooser = Chooser(checkpoint, picture, whole, None)
    ink = whole.tokens.with_ink(ink_of(picture.image))
    squares = [answer_squares(picture, question.answer) for question in picture.questions]
    enough = tuple(int(ink[part].sum()) for part in whole.tokens.parts)
    kept, features = chooser.choose("oracle", enough)
    assert set(kept.tolist()) == set(ink.nonzero()[:, 0].tolist()) | set(
        whole.tokens.fixed.tolist()
    )
    assert torch.equal(features, whole.image_embeds[kept])
    found = [recall for recall in recalls(whole, kept, squares) if recall is not None]
    assert found and found == [1.0] * len(found)
    few, _ = chooser.choose("oracle", tuple(max(1, n // 3) for n in enough))
    assert all(recall < 1 for recall in recalls(whole, few, squares) if recall is not None)
    assert ink_first(torch.tensor([False, True, False, True, False]), 3).tolist() == [0, 1, 3]


def test_random_choices_differ_and_come_again(chat, picture):
    checkpoint, whole = chat
    quotas = whole.tokens.quotas(300)
    first, again = (Chooser(checkpoint, picture, whole, None) for _ in range(2))
    chosen = [first.choose(f"random {seed}", quotas)[0].tolist() for seed in range(3)]
    assert chosen == [again.choose(f"random {seed}", quotas)[0].tolist() for seed in range(3)]
    assert len({tuple(each) for each in chosen}) == 3


@torch.inference_mode()
def test_a_smaller_picture_has_no_more_tokens_than_asked(chat, picture):
    checkpoint, whole = chat
    chooser = Chooser(checkpoint, picture, whole, None)
    smaller = chooser.smaller(400)
    assert 150 < smaller.tokens.num_tokens <= 400
    assert smaller.image[1] - smaller.image[0] == smaller.tokens.num_tokens
    assert chooser.smaller(2) is None


@pytest.mark.parametrize("kept", [84, 150])
def test_positions_are_those_that_the_servers_pruner_binds(kept):
    prompt = Prompt(3, (12, 14), 9)
    whole, features = prompt.positions.clone(), torch.randn(168, 8)
    ids = shrink(prompt.inputs, prompt.ids, GridLayout(2), kept / 168, "divprune")
    pruner = Pruner(GridLayout(2), 8, lambda choice: choice, Stats())
    pruner.features(lambda items: features, prompt.items)
    batch = type(
        "Batch",
        (),
        dict(multimodal_inputs=[prompt.inputs], prefix_lens=[0], extend_lens=[len(ids)]),
    )
    served = prompt.inputs.mrope_positions.clone()
    pruner.expect(batch)
    pruner.bind(served)
    first, behind = kept_positions(whole, (3, 171), divprune(features, kept)[None])
    assert torch.equal(torch.cat((first, behind), 2)[:, 0], served)


def test_one_dimensional_positions_are_consecutive():
    first, behind = kept_positions(
        torch.arange(30)[None], (4, 20), torch.tensor([[0, 3, 9], [1, 2, 15]])
    )
    assert torch.equal(torch.cat((first, behind), 2), torch.arange(17).expand(1, 2, -1))


@torch.inference_mode()
def test_all_tokens_at_full_width_are_the_exact_model(chat):
    checkpoint, whole = chat
    exact = checkpoint.model(**whole.inputs).logits[0]
    every = torch.arange(whole.tokens.num_tokens)
    read = read_answers(checkpoint, whole, every[None], whole.image_embeds[None])
    layers, total = checkpoint.num_layers, len(every)
    judges = [low - 1 for low, _ in whole.answers]
    for stages in (fastv(2, 1.0, layers, total), pyramid_drop(1.0, layers, total)):
        assert stages.bytes(layers, total) == 1
        by_stages, kept = read_with_stages(checkpoint, whole, stages, judges)
        assert torch.equal(kept, every.expand(len(judges), -1))
        for (low, high), one, other in zip(whole.answers, read, by_stages, strict=True):
            assert torch.allclose(one[0], exact[low - 1 : high - 1], atol=LOGIT_ATOL)
            assert torch.allclose(
                other, exact[low - 1 : high - 1].expand_as(other), atol=LOGIT_ATOL
            )
    assert is_right(whole, read).all(), "not what the trained model says: positions are off"


def test_bytes_of_pruners_inside_the_model_are_those_of_all_layers():
    assert (
        fastv(1, 0.5, 4, 576).kept == {1: 192}
        and fastv(2, 0.5, 4, 576) is None
        and fastv(2, 0.65, 28, 100).kept == {2: 62}
    )
    halves = pyramid_drop(0.46875, 4, 576)
    assert halves.kept == {1: 288, 2: 144, 3: 72} and halves.bytes(4, 576) == pytest.approx(0.46875)
    assert (
        sorted(pyramid_drop(0.5, 32, 576).kept) == [8, 16, 24]
        and pyramid_drop(0.25, 4, 576) is None
    )
    for share in (0.65, 0.5, 0.35, 0.28):
        for stages in (fastv(1, share, 4, 576), pyramid_drop(share, 4, 576)):
            assert share - 0.002 < stages.bytes(4, 576) <= share


@torch.inference_mode()
def test_a_question_keeps_what_its_last_token_attends_to(chat):
    """By the eager attention of the layer."""
    checkpoint, whole = chat
    start, end = whole.image
    judges = [low - 1 for low, _ in whole.answers]
    config = checkpoint.text_model.config
    name, config._attn_implementation = config._attn_implementation, "eager"
    attentions = checkpoint.model(**whole.inputs, output_attentions=True).attentions
    config._attn_implementation = name
    expected = torch.stack([attentions[0][0, :, judge, start:end].mean(0) for judge in judges])
    hidden, positions = whole.embeds.expand(3, -1, -1), whole.positions[:, None].expand(-1, 3, -1)
    rows = torch.tensor(judges) - len(whole.ids)
    with attention_to_image(checkpoint, rows, start, end - start) as seen:
        run_layer(checkpoint, checkpoint.text_model.layers[0], hidden, positions)
    assert torch.allclose(seen[0], expected, atol=1e-5)
    stages = fastv(1, 0.4, checkpoint.num_layers, end - start)
    _, kept = read_with_stages(checkpoint, whole, stages, judges)
    for row, of_judge in zip(kept, expected, strict=True):
        assert set(row.tolist()) == set(of_judge.topk(stages.kept[1]).indices.tolist())


@torch.inference_mode()
def test_what_training_sees_of_a_choice_is_what_the_evaluation_reads(chat, picture):
    checkpoint, whole = chat
    few = PrunedReader(reader_of(checkpoint), 0.5, "farthest")
    kept = few.choose(whole.image_embeds[None], whole.tokens)
    expected = [
        part[divprune(whole.image_embeds[part], k)]
        for part, k in zip(whole.tokens.parts, whole.tokens.of_share(0.5), strict=True)
    ]
    # Tokens of blank paper are alike but for rounding, which decides among them.
    expected = torch.cat((*expected, whole.tokens.fixed))
    assert len(kept[0]) == len(expected) and torch.isin(kept[0], expected).float().mean() > 0.9
    pixels = torch.from_numpy(np.array(picture.image)[None])
    text = whole.ids[whole.image[1] :]
    # The towers differ by rounding, which must not decide a second time.
    few.choose = lambda visual, tokens: kept
    logits, _ = few.forward(pixels, text[None])
    read = read_answers(checkpoint, whole, kept, whole.image_embeds[kept])
    end = whole.image[1]
    for (low, high), one in zip(whole.answers, read, strict=True):
        assert torch.allclose(logits[:, low - 1 - end : high - 1 - end], one, atol=0.02)


@torch.inference_mode()
def test_visionzip_keeps_as_many_and_merges(chat, picture):
    checkpoint, _ = chat
    tower = TowerScores(checkpoint)
    whole = make_chat(checkpoint, picture)
    received, metric = tower.of(whole.inputs)
    assert len(received) == len(metric) == whole.tokens.num_tokens
    quotas = whole.tokens.quotas(300)
    kept, features = Chooser(checkpoint, picture, whole, tower).choose("visionzip", quotas)
    assert len(kept) == sum(quotas) + len(whole.tokens.fixed) and (kept.diff() > 0).all()
    assert 0 < (features != whole.image_embeds[kept]).any(1).sum() < len(kept) / 2


def test_a_picture_is_read_by_every_arm_and_told(models, picture, tmp_path):
    plan = Plan(
        (0.35,),
        (FULL, "16+z4/z4"),
        ("uniform", "oracle", "random", ALL),
        ("uniform", ALL),
        ("fastv1",),
    )
    checkpoint = Checkpoint(models["reader_qwen2_5_vl"])
    evaluation = Evaluation(checkpoint, plan)
    evaluation.add(picture)
    arms = summary(evaluation.readings)
    names = [
        "full uniform",
        "full oracle",
        "full random",
        "16+z4/z4 uniform",
        "fastv1",
        "fastv1 reused",
    ]
    assert set(arms) == {"full all", "16+z4/z4 all", *names}
    assert (
        arms["full all"]["1"]["all"] == [100.0, None, 3]
        and arms["full all"]["1"]["recall"][0] == 100
    )
    assert [arms[name]["0.35"]["kept"] for name in names] == [201, 201, 201, 576, 76, 76]
    assert arms["16+z4/z4 uniform"]["0.35"]["right"] == arms["16+z4/z4 all"]["0.35"]["right"]
    assert arms["full uniform"]["0.35"]["all"][0] < arms["full oracle"]["0.35"]["all"][0] == 100
    assert arms["full random"]["0.35"]["recall"][0] < 60 < arms["full oracle"]["0.35"]["recall"][0]
    document = {"model": "reader", "pictures": 1, "families": ["documents"], "arms": arms}
    lines = [line.split() for line in table(document).splitlines()]
    assert lines[1] == ["arm", "0.35"] and ["full", "oracle", "100.0"] in lines
    markdown = table(document, "documents", markdown=True).splitlines()
    assert ["|", "full", "oracle", "|", "100.0", "|"] in [line.split() for line in markdown]
    gain = 100 - arms["full random"]["0.35"]["all"][0]
    against = table(json.loads(json.dumps(document)), against="full random", arms=["full oracle"])
    assert against.splitlines()[-1].split() == ["full", "oracle", f"{gain:+.1f}"]
    pruning_report.plot([document], tmp_path / "plot.png", "uniform")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_measures_take_a_picture_as_one_cluster():
    def reading(family, right, recall=(None, None)):
        return Reading(list(right), list(recall), 10, 0.4, 0.3, family)

    mine = [
        reading("charts", (1, 1), (1.0, 0.5)),
        reading("charts", (0, 0)),
        reading("scenes", (1, 0), (1.0, 1.0)),
    ]
    other = [reading("charts", (1, 0)), reading("charts", (0, 0)), reading("scenes", (0, 0))]
    found, beside = (summary({"arm": {0.5: each}})["arm"]["0.5"] for each in (mine, other))
    assert found["all"][0] == 50 and found["charts"][0] == 50 and found["scenes"] == [50, None, 2]
    assert found["turn 1"][0] == pytest.approx(66.667) and found["turn 2"][0] == pytest.approx(
        33.333
    )
    assert (
        found["recall"][0] == 87.5
        and found["readable"][0] == pytest.approx(66.667)
        and found["readable"][2] == 3
    )
    families = ["charts", "charts", "scenes"]
    assert pruning_report.difference(found, beside, families, "all")[0] == pytest.approx(33.333)
    assert pruning_report.difference(found, beside, families, "scenes") == [50.0, None, 2]
    assert pruning_report.difference(found, beside, families[:2], "all") is None
    five = Reading.mean(
        "charts", [reading("", (1, 0), (1.0, None)), reading("", (0, 0), (0.5, None))]
    )
    assert five.right == [0.5, 0] and five.recall == [0.75, None] and five.family == "charts"
