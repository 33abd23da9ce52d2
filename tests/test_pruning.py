"""Token pruning: what is chosen, and that the prompt that is left has the positions of the whole
one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalProcessorOutput,
)
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig

from sglang_rotatek.config import TOKEN_PRUNERS, RotateKConfig, RotateKError
from sglang_rotatek.models.llava_next import (
    LlavaNextForConditionalGeneration,
    tile_grid,
    unpadded_grid,
)
from sglang_rotatek.pruning import pruner as pruning
from sglang_rotatek.pruning.layouts import GridLayout, layout_of
from sglang_rotatek.pruning.pruner import Pruner, install_pruner
from sglang_rotatek.pruning.selectors import (
    RESIDUAL_RANK,
    SELECTORS,
    divprune,
    kept_tokens,
    residual,
    uniform,
)
from sglang_rotatek.pruning.shrink import KEPT, WHOLE, shrink
from sglang_rotatek.pruning.tiles import TileLayout
from sglang_rotatek.stats import Stats

IMAGE, TEXT = 7, 1
GRID = GridLayout(2)


def features(n: int, hidden: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, hidden, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("n", "keep", "kept"),
    [(127, 0.1, 127), (128, 0.1, 64), (1000, 0.35, 350), (1225, 0.5, 613), (300, 1.0, 300)],
)
def test_kept_tokens_follow_from_their_number(n, keep, kept):
    assert kept_tokens(n, keep) == kept


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_keeps_k_tokens_once_and_in_order(name):
    blank = features(200)
    blank[20:190] = blank[3]  # paper
    for x, k in (
        (features(200), 70),
        (blank, 64),
        (blank, 200),
        (features(5), 1),
        (features(30).half(), 29),
    ):
        chosen = SELECTORS[name](x, k)
        assert chosen.dtype == torch.int64 and len(chosen) == k
        assert (chosen.diff() > 0).all() and chosen.min() >= 0 and chosen.max() < len(x)
        assert torch.equal(chosen, SELECTORS[name](x.clone(), k))


def test_uniform_is_evenly_spaced():
    assert uniform(features(10), 5).tolist() == [0, 2, 4, 6, 8]


def test_divprune_adds_the_token_farthest_from_all_that_were_picked():
    x = features(40)
    unit = x / x.norm(dim=1, keepdim=True)
    distance = (1 - unit @ unit.T).tolist()
    picked = [max(range(40), key=lambda i: min(distance[i][j] for j in range(40) if j != i))]
    for _ in range(11):
        rest = [i for i in range(40) if i not in picked]
        picked.append(max(rest, key=lambda i: min(distance[i][j] for j in picked)))
    assert divprune(x, 12).tolist() == sorted(picked)


def test_residual_keeps_what_principal_components_explain_worst():
    x = features(80, 30) @ torch.diag(0.8 ** torch.arange(30))
    centred = x - x.mean(0)
    u, s, v = torch.linalg.svd(centred, full_matrices=False)
    left = centred - (u[:, :RESIDUAL_RANK] * s[:RESIDUAL_RANK]) @ v[:RESIDUAL_RANK]
    expected = left.square().sum(1).topk(30).indices.sort().values
    assert len(set(residual(x, 30).tolist()) & set(expected.tolist())) >= 29


def test_residual_of_an_image_of_few_components_keeps_what_is_in_none():
    x = torch.zeros(200, 64)
    x[:, :3] = features(200, 3)
    others = torch.arange(5, 200, 7)[:25]
    x[others] += torch.eye(64)[10:35]  # of which five components explain five at most
    assert set(residual(x, 20).tolist()) <= set(others.tolist())


class Prompt:
    """Text, images of grids and text, with M-RoPE positions as the host makes them."""

    def __init__(self, *parts: int | tuple[int, int], hashes: bool = True) -> None:
        ids, columns, items, at = [], [], [], 0
        for part in parts:
            start = len(ids)
            if isinstance(part, int):
                ids += [TEXT] * part
                columns += [(at + i,) * 3 for i in range(part)]
                at += part
                continue
            rows, width = part
            ids += [IMAGE] * (rows * width)
            columns += [(at, at + y, at + x) for y in range(rows) for x in range(width)]
            grid = torch.tensor([[1, 2 * rows, 2 * width]])
            item = MultimodalDataItem(
                modality=Modality.IMAGE,
                offsets=[(start, len(ids) - 1)],
                model_specific_data={"image_grid_thw": grid},
            )
            if hashes:
                item.set_hash(1000 + len(items))
            items.append(item)
            at += max(rows, width)
        self.ids, self.items = ids, items
        self.positions = torch.tensor(columns).T
        delta = torch.tensor([[at - len(ids)]])
        padded = MultimodalProcessorOutput.build_padded_input_ids(ids, items)
        self.inputs = MultimodalProcessorOutput(
            input_ids=list(ids), padded_input_ids=padded, mm_items=items,
            mrope_positions=self.positions.clone(), mrope_position_delta=delta,
        )  # fmt: skip


PARTS = (3, (12, 14), 5, (4, 5), 2, (16, 20), 4)
GRIDS = [part for part in PARTS if isinstance(part, tuple)]


def test_a_prompt_loses_the_last_placeholders_of_large_images_alone():
    prompt = Prompt(*PARTS)
    before = [item.hash for item in prompt.items]
    ids = shrink(prompt.inputs, prompt.ids, GRID, 0.5, "divprune")
    assert (
        ids
        == [TEXT] * 3
        + [IMAGE] * 84
        + [TEXT] * 5
        + [IMAGE] * 20
        + [TEXT] * 2
        + [IMAGE] * 160
        + [TEXT] * 4
    )
    assert prompt.inputs.input_ids == ids
    assert [item.offsets for item in prompt.items] == [[(3, 86)], [(92, 111)], [(114, 273)]]
    assert [item.model_specific_data.get(KEPT) for item in prompt.items] == [[84], None, [160]]
    pads = prompt.inputs.padded_input_ids
    assert [
        set(pads[first : last + 1]) for ((first, last),) in (item.offsets for item in prompt.items)
    ] == [set(item.padding_values()) for item in prompt.items]
    changed = [item.hash != old for item, old in zip(prompt.items, before, strict=True)]
    assert changed == [True, False, True]
    # What follows is where it would be in the whole prompt, and so is the first token of an answer.
    is_text = torch.tensor(ids) == TEXT
    assert torch.equal(
        prompt.inputs.mrope_positions[:, is_text],
        prompt.positions[:, torch.tensor(prompt.ids) == TEXT],
    )
    assert len(ids) + prompt.inputs.mrope_position_delta.item() == prompt.positions.max() + 1


def test_share_and_selector_are_part_of_an_image_s_key():
    def key(keep, pruner):
        prompt = Prompt(*PARTS)
        shrink(prompt.inputs, prompt.ids, GRID, keep, pruner)
        return prompt.items[0].hash

    assert len({key(0.5, "divprune"), key(0.6, "divprune"), key(0.5, "residual")}) == 3


def test_a_prompt_of_small_images_videos_or_embeddings_stays_whole():
    small = Prompt(3, (4, 5), 2)
    assert shrink(small.inputs, small.ids, GRID, 0.5, "divprune") is small.ids
    assert small.items[0].model_specific_data[WHOLE] == "too_small"
    for name, value, reason in (
        ("modality", Modality.VIDEO, "video"),
        ("precomputed_embeddings", torch.zeros(168, 4), "precomputed_embeddings"),
        ("model_specific_data", {}, "placeholders_do_not_match_its_size"),
        ("offsets", [(3, 80), (90, 170)], "not_one_picture_in_one_run"),
        # Ready embeddings, as Qwen2.5-VL takes them.
        ("feature", torch.zeros(168, 24), "not_one_picture_in_one_run"),
        (
            "model_specific_data",
            {"image_grid_thw": torch.tensor([[1, 12, 28]] * 2)},
            "not_one_picture_in_one_run",
        ),
    ):
        prompt, stats = Prompt(3, (12, 14), 2, hashes=False), Stats()
        item = prompt.items[0]
        setattr(item, name, value)
        assert shrink(prompt.inputs, prompt.ids, GRID, 0.5, "divprune") is prompt.ids
        # Counted where its first token is computed, in none of the chunks behind it, and not where
        # it is cached.
        pruner = Pruner(GRID, 24, lambda choice: choice, stats)
        for prefix, length in ((0, 50), (50, 123), (173, 4)):
            pruner.expect(
                SimpleNamespace(
                    multimodal_inputs=[prompt.inputs], prefix_lens=[prefix], extend_lens=[length]
                )
            )
        assert stats.images_not_pruned == {reason: 1}


@pytest.mark.parametrize("chunk", [1000, 64, 7])
def test_kept_tokens_get_their_own_positions_in_every_chunk(chunk):
    prompt, stats = Prompt(*PARTS), Stats()
    ids = shrink(prompt.inputs, prompt.ids, GRID, 0.5, "divprune")
    pruner = Pruner(GRID, 24, lambda choice: choice, stats)
    tower = {
        item.hash: features(rows * width, seed=i)
        for i, (item, (rows, width)) in enumerate(zip(prompt.items, GRIDS, strict=True))
    }
    kept = pruner.features(
        lambda items: torch.cat([tower[item.hash] for item in items]), prompt.items
    )
    assert [len(each) for each in kept] == [84, 20, 160] and stats.tokens_pruned == 84 + 160
    # The prompt beside one of text, in chunks of which each computes what the one before left.
    seen = []
    for prefix in range(0, len(ids), chunk):
        length = min(chunk, len(ids) - prefix)
        whole = prompt.inputs.mrope_positions[:, prefix : prefix + length]
        positions = torch.cat([torch.full((3, 4), -1), whole], 1)
        pruner.expect(
            SimpleNamespace(
                multimodal_inputs=[None, prompt.inputs],
                prefix_lens=[9, prefix],
                extend_lens=[4, length],
            )
        )
        pruner.bind(positions)
        assert (positions[:, :4] == -1).all()
        seen.append(positions[:, 4:])
        left = positions.clone()
        pruner.bind(positions)  # of a forward that was not told of, such as a decode step
        assert torch.equal(positions, left)
    columns, first = [], 0
    for part, item in zip(
        PARTS,
        [None, prompt.items[0], None, prompt.items[1], None, prompt.items[2], None],
        strict=True,
    ):
        if item is None:
            columns += range(first, first + part)
            first += part
            continue
        size = part[0] * part[1]
        stays = (
            divprune(tower[item.hash], item.model_specific_data[KEPT][0])
            if KEPT in item.model_specific_data
            else torch.arange(size)
        )
        columns += (first + stays).tolist()
        first += size
    assert torch.equal(torch.cat(seen, 1), prompt.positions[:, columns])


def test_a_choice_is_remembered_whatever_the_tower_gives_later():
    prompt = Prompt(3, (12, 14), 2)
    shrink(prompt.inputs, prompt.ids, GRID, 0.5, "divprune")
    calls = []
    pruner = Pruner(GRID, 24, lambda choice: calls.append(choice) or choice, Stats())
    first, second = features(168), features(168, seed=1)
    (a,), (b,) = (pruner.features(lambda items: x, prompt.items) for x in (first, second))
    choice = divprune(first, 84)
    assert torch.equal(a, first[choice]) and torch.equal(b, second[choice]) and len(calls) == 1
    with pytest.raises(RuntimeError, match="gave 160 tokens for images of .168"):
        pruner.features(lambda items: first[:160], prompt.items)


def test_choices_of_images_that_are_computed_outlive_those_that_are_not(monkeypatch):
    monkeypatch.setattr(pruning, "MOST_CHOICE_BYTES", 2 * 84 * 8)
    prompts, calls = [Prompt(3, (12, 14), 2) for _ in range(3)], []
    pruner = Pruner(GRID, 24, lambda choice: calls.append(choice) or choice, Stats())
    for i, prompt in enumerate(prompts):
        prompt.items[0].set_hash(i)
        shrink(prompt.inputs, prompt.ids, GRID, 0.5, "divprune")

    def choose(i: int) -> None:
        pruner.features(lambda items: features(168, seed=i), prompts[i].items)

    def compute(i: int) -> None:
        pruner.expect(
            SimpleNamespace(
                multimodal_inputs=[prompts[i].inputs], prefix_lens=[0], extend_lens=[89]
            )
        )
        pruner.bind(prompts[i].inputs.mrope_positions.clone())

    choose(0), choose(1)
    compute(0)  # its embedding is cached: the tower does not run
    choose(2)  # in place of 1
    compute(0)
    choose(0)
    assert len(calls) == 3
    choose(1)
    assert len(calls) == 4


def test_what_a_tower_puts_behind_the_embeddings_changes_no_choice():
    prompt = Prompt(3, (12, 14), 2)
    shrink(prompt.inputs, prompt.ids, GRID, 0.5, "divprune")
    x = features(168)
    deep = torch.cat((x, 9 * features(168, 48, seed=1)), 1)
    (kept,) = Pruner(GRID, 24, lambda choice: choice, Stats()).features(
        lambda items: deep, prompt.items
    )
    assert torch.equal(kept, deep[divprune(x, 84)])


def llava_next(strategy: str = "default") -> LlavaNextConfig:
    return LlavaNextConfig(
        text_config=LlamaConfig(hidden_size=24, num_attention_heads=1, vocab_size=16),
        vision_config=CLIPVisionConfig(image_size=336, patch_size=14),
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        vision_feature_select_strategy=strategy,
        architectures=["LlavaNextForConditionalGeneration"],
    )


def tiled(
    config: LlavaNextConfig, *sizes: tuple[int, int]
) -> tuple[MultimodalProcessorOutput, list[int]]:
    """A prompt of pictures of ``sizes`` (height, width) px side by side, between text."""
    ids, items, layout = [TEXT] * 5, [], TileLayout(config)
    for size in sizes:
        item = MultimodalDataItem(
            modality=Modality.IMAGE, model_specific_data={"image_sizes": size}
        )
        item.offsets = [(len(ids), len(ids) + layout.num_tokens(item) - 1)]
        item.set_hash(1000 + len(items))
        ids += [IMAGE] * layout.num_tokens(item)
        items.append(item)
    return MultimodalProcessorOutput(input_ids=list(ids), mm_items=items), ids + [TEXT] * 3


# Square, wide, tall and small pictures, one whose rows share a tile of few patches, and one that
# fills its tiles.
SIZES = [(500, 500), (200, 600), (600, 200), (30, 20), (10, 300), (300, 1400), (672, 672)]


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("size", SIZES)
def test_every_tile_of_llava_next_keeps_its_share_and_every_row_its_newline(strategy, size):
    config = llava_next(strategy)
    layout = layout_of(config)
    inputs, ids = tiled(config, size)
    (item,) = inputs.mm_items
    whole = layout.num_tokens(item)
    shorter = shrink(inputs, ids, layout, 0.35, "divprune")
    # What a token is, as a feature that ``pack`` lays out: class token, patch of tile (row,
    # column), or newline.
    tiles, side = tile_grid(config, size), 24
    marks = torch.full((1 + tiles[0] * tiles[1], 1 + side * side, 24), -1.0)
    for t in range(len(marks)):
        marks[t, 1:, 0] = t
        marks[t, 1:, 1:] = features(side * side, 23, seed=t)
    host = SimpleNamespace(config=config, image_newline=torch.full((24,), -2.0))
    packed = LlavaNextForConditionalGeneration.pack(host, marks, size)
    pruner = Pruner(layout, 24, lambda choice: choice, Stats())
    ((kept,)) = pruner.features(lambda items: packed, inputs.mm_items)
    assert len(packed) == whole and len(shorter) == len(ids) - whole + len(kept)
    assert item.offsets == [(5, 4 + len(kept))]
    rows, _ = unpadded_grid(config, size)
    assert (kept[:, 0] == -2).sum() == len(rows)
    assert (kept[:, 0] == -1).sum() == (strategy == "full")
    for tile in range(len(marks)):
        mine = packed[:, 0] == tile
        valid = int(mine.sum())
        if valid:
            assert (kept[:, 0] == tile).sum() == kept_tokens(valid, 0.35, 2 if tile else 64)
            chosen = packed[mine][divprune(packed[mine], int((kept[:, 0] == tile).sum()))]
            assert torch.equal(kept[kept[:, 0] == tile], chosen)
    # In the order of the prompt: each kept token is the next of its like in the whole sequence.
    at = 0
    for row in kept:
        while not torch.equal(packed[at], row):
            at += 1
        at += 1
    assert kept[-1, 0] == -2, "the last row keeps its newline"


def test_pictures_of_llava_next_side_by_side_lose_their_own_placeholders():
    config = llava_next()
    layout = TileLayout(config)
    inputs, ids = tiled(config, *SIZES)
    before = [layout.num_tokens(item) for item in inputs.mm_items]
    hashes = [item.hash for item in inputs.mm_items]
    shorter = shrink(inputs, ids, layout, 0.5, "uniform")
    at = 5
    for item, whole, old in zip(inputs.mm_items, before, hashes, strict=True):
        ((start, last),) = item.offsets
        assert start == at and last + 1 - start < 0.6 * whole and item.hash != old
        at = last + 1
    assert shorter == [TEXT] * 5 + [IMAGE] * (at - 5) + [TEXT] * 3


def test_bad_flags_and_other_models_are_refused():
    assert (*SELECTORS, "visionzip") == TOKEN_PRUNERS
    for fields, message in (
        ({"keep_tokens": 0.0}, "--rotatek-keep-tokens must be in .0, 1., got 0.0"),
        ({"token_pruner": "best"}, "--rotatek-token-pruner must be one of .*, got 'best'"),
    ):
        with pytest.raises(RotateKError, match=message):
            RotateKConfig(**fields)
    assert install_pruner(torch.nn.Module(), None, RotateKConfig(), Stats()) is None
    RotateKConfig(keep_tokens=0.5).check_prunable("Qwen2_5_VLForConditionalGeneration")
    for other in ("InternVLChatModel", "LlavaLlamaForCausalLM"):
        with pytest.raises(
            RotateKError, match=f"--rotatek-keep-tokens 0.5 works with .*, got {other}; drop it"
        ):
            RotateKConfig(keep_tokens=0.5).check_prunable(other)
