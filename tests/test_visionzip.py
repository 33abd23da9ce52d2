"""VisionZip: attention in blocks, the choice and its merges by plain loops, and a tower of
Transformers."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from dense_tower import TowerRun, class_token_scores, run_tower
from pictures import picture
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem
from sglang.srt.models.qwen2_5_vl import Qwen2_5_VisionTransformer
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from sglang_rotatek.models.llava_next import LlavaNextForConditionalGeneration, tile_grid
from sglang_rotatek.pruning.choice import Choice, union
from sglang_rotatek.pruning.class_token import ClassTokenAttention
from sglang_rotatek.pruning.layouts import GridLayout
from sglang_rotatek.pruning.pruner import Pruner
from sglang_rotatek.pruning.shrink import KEPT, PRUNER
from sglang_rotatek.pruning.tiles import TileLayout
from sglang_rotatek.pruning.visionzip import TowerAttention, attention_received, select
from sglang_rotatek.stats import Stats

# 16 x 12, 4 x 4 and 11 x 15 tokens: windows of 4 x 4 divide some.
SIZES = ((448, 336), (112, 112), (308, 420))
KEEP = 70


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("most_weights", [1, 3 * 90 * 7, 3 * 90 * 90, 2**25])
def test_attention_in_blocks_is_the_column_sum_of_all_weights(most_weights):
    q, k = random(90, 3, 16), random(90, 3, 16, seed=1)
    weights = (torch.einsum("qhd,khd->hqk", q, k) / 4).softmax(-1)
    received = attention_received(q, k, most_weights)
    torch.testing.assert_close(received, weights.sum((0, 1)))
    assert received.dtype == torch.float32 and received.sum() == pytest.approx(90 * 3)


def plain_choice(
    k: int, received: torch.Tensor, metric: torch.Tensor
) -> tuple[list[int], dict[int, list[int]]]:
    """The tokens that stay, and of each target those that join it."""
    n = len(received)
    contextual = min(max(1, n // 20), k - 1)
    order = sorted(range(n), key=lambda i: (-float(received[i]), i))
    dominant, rest = order[: k - contextual], sorted(order[k - contextual :])
    members: dict[int, list[int]] = {
        rest[i * len(rest) // contextual]: [] for i in range(contextual)
    }
    cosine = torch.cosine_similarity(metric[:, None], metric[None], dim=-1)
    for i in rest:
        if i not in members:
            members[max(members, key=lambda target: float(cosine[i, target]))].append(i)
    return sorted([*dominant, *members]), members


def plain_merge(
    features: torch.Tensor, tokens: list[int], members: dict[int, list[int]]
) -> torch.Tensor:
    rows = []
    for i in tokens:
        row = features[i].float()
        if members.get(i):
            row = row + sum(features[j].float() for j in members[i]) / len(members[i])
        rows.append(row)
    return torch.stack(rows).to(features.dtype)


@pytest.mark.parametrize(("n", "k"), [(200, 70), (130, 65), (64, 2), (300, 10), (19, 18), (40, 40)])
def test_choice_and_merge_are_those_of_a_plain_loop(n, k):
    received, metric, features = random(n).exp(), random(n, 8, seed=1), random(n, 24, seed=2)
    choice = select(k, received, metric)
    tokens, members = plain_choice(k, received, metric)
    assert choice.tokens.tolist() == tokens and len(tokens) == k
    assert sorted(choice.tokens[choice.targets].tolist()) == sorted(members)
    torch.testing.assert_close(choice.apply(features), plain_merge(features, tokens, members))
    half = features.half()
    torch.testing.assert_close(choice.apply(half), plain_merge(half, tokens, members))
    again = select(k, received.clone(), metric.clone())
    assert all(torch.equal(a, b) for a, b in zip(choice, again, strict=True))


def test_of_equal_tokens_the_first_stay_and_the_first_target_takes_all():
    received = torch.ones(160)
    received[100:104] = 2  # ink on paper
    metric = torch.eye(4)[0].expand(160, 4)
    choice = select(64, received, metric)
    tokens, members = plain_choice(64, received, metric)
    assert (
        choice.tokens.tolist()
        == tokens
        == [*range(53), 65, 78, 91, *range(100, 104), 108, 121, 134, 147]
    )
    assert [len(each) for each in members.values()] == [160 - 64, *[0] * 7]
    features = random(160, 24)
    torch.testing.assert_close(choice.apply(features), plain_merge(features, tokens, members))


def test_a_union_of_choices_merges_within_each_group():
    members = (torch.arange(0, 120, 2), torch.arange(1, 100, 2), torch.arange(101, 119, 2))
    always = torch.tensor([119])
    received, metric, features = random(120).exp(), random(120, 8, seed=1), random(120, 24, seed=2)
    parts = [
        (each, select(k, received[each], metric[each]))
        for each, k in zip(members, (20, 30, 2), strict=True)
    ]
    choice = union(always, parts, 120)
    expected = {119: features[119]}
    for each, k in zip(members, (20, 30, 2), strict=True):
        tokens, targets = plain_choice(k, received[each], metric[each])
        expected |= dict(
            zip(each[tokens].tolist(), plain_merge(features[each], tokens, targets), strict=True)
        )
    assert choice.tokens.tolist() == sorted(expected)
    torch.testing.assert_close(
        choice.apply(features), torch.stack([expected[i] for i in sorted(expected)])
    )


class HostTower(SimpleNamespace):
    """The host's tower as far as its attention is read; Transformers computes what goes through
    it."""

    def __init__(self, visual: torch.nn.Module) -> None:
        backends = [SimpleNamespace(forward=self.attend) for _ in visual.blocks]
        blocks = [
            SimpleNamespace(attn=SimpleNamespace(qkv_backend=backend)) for backend in backends
        ]
        super().__init__(blocks=blocks, spatial_merge_size=2, spatial_merge_unit=4, attended=0)
        if hasattr(visual, "window_size"):
            self.fullatt_block_indexes = visual.fullatt_block_indexes
            self.window_size, self.patch_size = visual.window_size, visual.patch_size
            self.get_window_index = partial(Qwen2_5_VisionTransformer.get_window_index, self)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bsz: int) -> None:
        self.attended += 1

    def forward(self, run: TowerRun, heads: slice = slice(None)) -> torch.Tensor:
        for block in self.blocks[:-1]:
            block.attn.qkv_backend.forward(q=-run.q, k=-run.k, v=run.k, bsz=1)
        self.blocks[-1].attn.qkv_backend.forward(
            q=run.q[:, heads], k=run.k[:, heads], v=run.k, bsz=1
        )
        return torch.cat(run.features)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2_vl"])
def visual(request, models) -> torch.nn.Module:
    return (
        AutoModelForImageTextToText.from_pretrained(models[request.param], dtype=torch.float32)
        .eval()
        .model.visual
    )


@pytest.fixture(scope="module")
def batch(visual, models) -> tuple[TowerRun, list[MultimodalDataItem]]:
    pictures = [picture(seed, size) for seed, size in enumerate(SIZES)]
    inputs = AutoImageProcessor.from_pretrained(models["qwen2_5_vl"])(
        images=pictures, return_tensors="pt"
    )
    items = []
    for i, grid in enumerate(inputs["image_grid_thw"]):
        data = {"image_grid_thw": grid[None]}
        if grid.prod() > 4 * KEEP:
            data |= {KEPT: [KEEP], PRUNER: "visionzip"}
        items.append(MultimodalDataItem(modality=Modality.IMAGE, model_specific_data=data))
        items[-1].set_hash(100 + i)
    return run_tower(visual, inputs["pixel_values"], inputs["image_grid_thw"]), items


def test_pictures_of_a_batch_are_chosen_from_as_a_dense_tower_attends_to_each(visual, batch):
    run, items = batch
    assert [len(each) for each in run.features] == [192, 16, 165]
    tower, broadcast = HostTower(visual), []
    pruner = Pruner(
        GridLayout(2),
        24,
        lambda tensor: broadcast.append(tensor) or tensor,
        Stats(),
        TowerAttention(tower, lambda sums: sums),
    )
    kept = pruner.features(lambda _: tower.forward(run), items)
    assert tower.attended == len(tower.blocks)
    for i in (0, 2):
        tokens, members = plain_choice(KEEP, run.received[i], run.metric[i])
        torch.testing.assert_close(kept[i], plain_merge(run.features[i], tokens, members))
    assert torch.equal(kept[1], run.features[1])
    assert len(broadcast) == 2 * len(Choice._fields)
    # An embedding that the host has dropped is made again, of what is chosen already; so is one
    # that comes alone.
    later = run._replace(features=[each + 1 for each in run.features], q=run.k, k=run.q)
    again = pruner.features(lambda _: tower.forward(later), items)
    alone = pruner.features(lambda _: later.features[2], items[2:])
    tokens, members = plain_choice(KEEP, run.received[2], run.metric[2])
    torch.testing.assert_close(again[2], plain_merge(later.features[2], tokens, members))
    assert torch.equal(alone[0], again[2]) and len(broadcast) == 2 * len(Choice._fields)


def test_ranks_that_share_the_heads_choose_as_one_that_has_all(visual, batch):
    run, items = batch
    sums: list[torch.Tensor] = []
    for heads in (slice(0, 1), slice(1, 2)):
        tower = HostTower(visual)
        attention = TowerAttention(tower, lambda part: sums.append(part) or part)
        with attention.recording():
            tower.forward(run, heads)
            attention.scores(items, 2)
    tower = HostTower(visual)
    attention = TowerAttention(tower, lambda part: sums[0] + sums[1])
    with attention.recording():
        tower.forward(run, slice(1, 2))
        choice = select(KEEP, *attention.scores(items, 2))
    assert choice.tokens.tolist() == plain_choice(KEEP, run.received[2], run.metric[2])[0]


def test_a_batch_that_is_not_pruned_leaves_no_attention_behind(visual, batch):
    run, items = batch
    tower = HostTower(visual)
    attention = TowerAttention(tower, lambda sums: sums)
    pruner = Pruner(GridLayout(2), 24, lambda tensor: tensor, Stats(), attention)
    pruner.features(lambda _: tower.forward(run), items[1:2])
    pruner.features(lambda _: tower.forward(run), items)
    tower.forward(run)
    with pytest.raises(
        RuntimeError,
        match="attend to 0 patches, but those of a picture are 0 to 768; prune with another",
    ):
        attention.scores(items, 0)


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_llava_next_scores_every_patch_by_the_attention_of_the_class_token(models, strategy):
    model = AutoModelForImageTextToText.from_pretrained(
        models["llava_next_hf"], dtype=torch.float32
    ).eval()
    model.config.vision_feature_select_strategy = strategy
    tower, layout = model.model.vision_tower, TileLayout(model.config)
    attention = ClassTokenAttention(tower, layout)
    sizes = [(140, 280), (100, 200), (200, 60)]
    items = []
    for seed, size in enumerate(sizes):
        rows, columns = tile_grid(model.config, size)
        tiles = random(1 + rows * columns, 3, 140, 140, seed=seed)
        items.append(
            MultimodalDataItem(
                modality=Modality.IMAGE, feature=tiles, model_specific_data={"image_sizes": size}
            )
        )
    host = SimpleNamespace(
        config=model.config, image_newline=torch.zeros(1 + tower.config.hidden_size // 2)
    )
    with attention.recording(), torch.inference_mode():
        tower(torch.cat([item.feature for item in items]))
        found = [attention.scores(items, index) for index in range(len(items))]
    assert not len(attention._keys), "the next batch needs the memory"
    for (received, metric), item, size in zip(found, items, sizes, strict=True):
        # In the order in which the model packs its features.
        expected = LlavaNextForConditionalGeneration.pack(
            host, class_token_scores(tower, item.feature), size
        )
        assert len(received) == len(metric) == layout.num_tokens(item)
        patches = torch.cat([group.tokens for group in layout.groups(item)])
        assert len(patches) == int((expected != 0).all(1).sum()) - (strategy == "full")
        torch.testing.assert_close(received[patches], expected[patches, 0])
        torch.testing.assert_close(metric[patches], expected[patches, 1:])
