"""The native LLaVA-NeXT against Transformers, without a server: token counts, packing, weight
names."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_pictures import PICTURES
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextProcessor
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from sglang_rotatek.config import RotateKError
from sglang_rotatek.models.llava_next import (
    LlavaNextForConditionalGeneration,
    has_class_token,
    num_image_tokens,
    own_name,
    tile_grid,
    unpadded_grid,
)
from sglang_rotatek.requests.pictures import picture_size

HIDDEN = 4
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SIZE = st.integers(20, 1500)


def config(strategy: str = "default") -> LlavaNextConfig:
    return LlavaNextConfig(
        text_config=LlamaConfig(
            vocab_size=16,
            hidden_size=HIDDEN,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        ),
        vision_config=CLIPVisionConfig(image_size=336, patch_size=14),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=False,
    )


def features_of(config: LlavaNextConfig, size: tuple[int, int]) -> torch.Tensor:
    rows, columns = tile_grid(config, size)
    return torch.randn(1 + rows * columns, 1 + 24 * 24, HIDDEN)


@pytest.mark.parametrize("strategy", ["default", "full"])
@settings(deadline=None, max_examples=200)
@given(height=SIZE, width=SIZE)
def test_as_many_tokens_as_the_processor_puts_into_the_prompt(strategy, height, width):
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=PINPOINTS),
        patch_size=14,
        num_additional_image_tokens=1,
    )
    processor._get_unpadded_features = lambda *sizes: LlavaNextProcessor._get_unpadded_features(
        processor, *sizes
    )
    expected = LlavaNextProcessor._get_number_of_features(processor, height, width, 336, 336)
    expected -= strategy == "default"
    assert num_image_tokens(config(strategy), (height, width)) == expected


@settings(deadline=None, max_examples=100)
@given(height=SIZE, width=SIZE)
def test_packing_equals_transformers(height, width):
    host = SimpleNamespace(config=config(), image_newline=torch.randn(HIDDEN))
    features = features_of(host.config, (height, width))
    expected, lengths = LlavaNextModel.pack_image_features(
        host, [features[:, 1:]], torch.tensor([[height, width]]), "default", host.image_newline
    )
    packed = LlavaNextForConditionalGeneration.pack(host, features, (height, width))
    assert len(packed) == lengths[0] == num_image_tokens(host.config, (height, width))
    assert torch.equal(packed, expected[0])


@settings(deadline=None, max_examples=50)
@given(height=SIZE, width=SIZE)
def test_full_strategy_is_default_with_the_class_token_first(height, width):
    # Transformers counts these tokens but cannot pack them: it folds the tiles' class tokens into
    # the grid and fails.
    default, full = (
        SimpleNamespace(config=config(strategy), image_newline=torch.zeros(HIDDEN))
        for strategy in ("default", "full")
    )
    features = features_of(default.config, (height, width))
    packed = LlavaNextForConditionalGeneration.pack(full, features, (height, width))
    assert has_class_token(full.config) and torch.equal(packed[0], features[0, 0])
    assert torch.equal(
        packed[1:], LlavaNextForConditionalGeneration.pack(default, features, (height, width))
    )


@pytest.mark.parametrize(
    "names, own",
    [
        (
            (
                "model.language_model.layers.0.mlp.up_proj.weight",
                "language_model.model.layers.0.mlp.up_proj.weight",
            ),
            "language_model.model.layers.0.mlp.up_proj.weight",
        ),
        (("lm_head.weight", "language_model.lm_head.weight"), "language_model.lm_head.weight"),
        (
            (
                "model.vision_tower.vision_model.pre_layrnorm.bias",
                "vision_tower.vision_model.pre_layrnorm.bias",
                "vision_tower.pre_layrnorm.bias",
            ),
            "vision_tower.pre_layrnorm.bias",
        ),
        (
            ("multi_modal_projector.linear_1.bias", "model.multi_modal_projector.linear_1.bias"),
            "projector.linear_1.bias",
        ),
        (("image_newline", "model.image_newline"), "image_newline"),
    ],
)
def test_published_and_newer_weight_names(names, own):
    assert {own_name(name) for name in names} == {own}


def test_missing_and_unknown_weights_are_named():
    model = SimpleNamespace(config=config())
    own = {"image_newline": None}
    with torch.device("meta"):
        text = LlavaNextModel(config()).language_model.state_dict()
    complete = {f"language_model.model.{name}" for name in text} | {
        "language_model.lm_head.weight",
        "image_newline",
    }
    check = LlavaNextForConditionalGeneration._check_names
    check(model, complete, own)
    with pytest.raises(
        RotateKError, match="lacks weights, 1 in all: image_newline; .*Download it again"
    ):
        check(model, complete - {"image_newline"}, own)
    with pytest.raises(RotateKError, match="has unknown weights, 1 in all: adapter.weight"):
        check(model, complete | {"adapter.weight"}, own)


def test_a_picture_without_a_row_of_patches_is_refused_by_its_size():
    from sglang_rotatek.models.llava_next_processor import LlavaNextProcessor as Processor

    processor = SimpleNamespace(hf_config=config())
    Processor._checked(processor, [Image.new("RGB", (300, 20))])
    assert not all(unpadded_grid(processor.hf_config, (1, 4000)))
    with pytest.raises(ValueError, match="picture 2 is 4000 x 1 px: too long and narrow"):
        Processor._checked(processor, [Image.new("RGB", (300, 20)), Image.new("RGB", (4000, 1))])


@pytest.mark.parametrize("kind", PICTURES)
def test_every_kind_of_loaded_picture_is_measured_and_becomes_rgb(kind):
    from sglang_rotatek.models.llava_next_processor import LlavaNextProcessor as Processor

    processor = SimpleNamespace(hf_config=config())
    processed = {"format": "processor_output"}
    picture, same = Processor._checked(processor, [PICTURES[kind](20, 300), processed])
    assert same is processed
    assert picture_size(picture) == (20, 300)
    assert isinstance(picture, Image.Image) or 3 in (picture.shape[0], picture.shape[2])
    with pytest.raises(ValueError, match="picture 1 is 6000 x 2 px"):
        Processor._checked(processor, [PICTURES[kind](2, 6000)])


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_video_and_audio_are_refused_by_their_kind(kind):
    from sglang_rotatek.models.llava_next_processor import LlavaNextProcessor as Processor

    request = SimpleNamespace(
        **{"video_data": None, "audio_data": None, f"{kind}_data": ["data:,"]}
    )
    with pytest.raises(
        ValueError, match=f"LLaVA-NeXT takes text and pictures, got {kind}: leave it out"
    ):
        asyncio.run(Processor.process_mm_data_async(SimpleNamespace(), None, "what?", request))


def test_items_of_pictures_side_by_side_and_of_blank_pictures_that_differ_in_size_alone():
    from sglang_rotatek.models.llava_next_processor import LlavaNextProcessor as Processor

    sizes = [(200, 300), (300, 300), (200, 300)]
    lengths = [num_image_tokens(config(), size) for size in sizes]
    processor = SimpleNamespace(
        hf_config=config(), image_token_id=7, mm_tokens=SimpleNamespace(image_token="<image>")
    )
    data = {
        "input_ids": torch.tensor([[1] + [7] * (lengths[0] + lengths[1]) + [2] + [7] * lengths[2]]),
        "pixel_values": torch.zeros(3, 5, 3, 8, 8),
        "image_sizes": torch.tensor(sizes),
    }
    items = Processor.collect_mm_items_from_processor_output(processor, data)
    first, second = 1 + lengths[0], 1 + lengths[0] + lengths[1]
    expected = [(1, first - 1), (first, second - 1), (second + 1, second + lengths[2])]
    assert [item.offsets for item in items] == [[span] for span in expected]
    assert items[0].pad_value == items[2].pad_value != items[1].pad_value
    data["input_ids"] = data["input_ids"][:, :-1]
    with pytest.raises(
        RotateKError,
        match=f"expected {sum(lengths)} image tokens .*found {sum(lengths) - 1} in the prompt",
    ):
        Processor.collect_mm_items_from_processor_output(processor, data)


def test_a_text_model_it_has_no_backbone_for_is_refused():
    other = config()
    other.text_config.model_type = "gemma"
    with pytest.raises(
        RotateKError, match="expects a text model of llama, mistral, qwen2 .* got gemma"
    ):
        LlavaNextForConditionalGeneration(other)


def test_the_host_knows_the_architecture_only_with_a_flag(models):
    """In interpreters of their own: registries are global."""
    code = (
        "from sglang.srt.plugins import load_plugins; load_plugins()\n"
        "from sglang.srt.server_args import ServerArgs\n"
        "from sglang.srt.model_loader.utils import get_resolved_model_impl\n"
        "from sglang.srt.arg_groups.model_override_base import model_config_of\n"
        "args = ServerArgs(model_path={path!r}, device='cpu', {flags})\n"
        "print(get_resolved_model_impl(model_config_of(args)).value)"
    )
    for flags, implementation in (("", "transformers"), ("native_llava_next=True", "sglang")):
        script = code.format(path=str(models["llava_next_hf"]), flags=flags)
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.split()[-1] == implementation
