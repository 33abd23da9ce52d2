"""Which models RotateK serves: by what the host tells of their attention, from config.json
alone."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import transformers
from sglang.srt.configs.deepseekvl2 import DeepseekVL2Config
from sglang.srt.configs.internvl import InternVLChatConfig
from sglang.srt.configs.kimi_vl import KimiVLConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.qwen3_5 import Qwen3_5Config
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from torch import nn
from transformers import PreTrainedConfig

from sglang_rotatek.attention.backend import RotateKTorchBackend
from sglang_rotatek.config import RotateKError
from sglang_rotatek.patches.model_config import TESTED_ARCHITECTURES, check_layers, check_model

MLA = "multi-head latent attention"
WINDOW = "a sliding window"
STATE = "a recurrent state"
SHAPE = dict(
    hidden_size=512,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=2,
    vocab_size=1024,
)


def internvl(text: PreTrainedConfig) -> InternVLChatConfig:
    return InternVLChatConfig(
        llm_config=text.to_dict(), vision_config={"architectures": ["InternVisionModel"]}
    )


def qwen3_moe() -> PreTrainedConfig:
    return transformers.Qwen3MoeConfig(**SHAPE, head_dim=128, architectures=["Qwen3MoeForCausalLM"])


def windowed_qwen2() -> PreTrainedConfig:
    return transformers.Qwen2Config(
        **SHAPE,
        use_sliding_window=True,
        sliding_window=128,
        max_window_layers=1,
        architectures=["Qwen2ForCausalLM"],
    )


REFUSED = {
    "KimiVLForConditionalGeneration": (KimiVLConfig, MLA),
    "DeepseekVL2ForCausalLM": (DeepseekVL2Config, MLA),
    "Gemma3ForConditionalGeneration": (transformers.Gemma3Config, WINDOW),
    "Gemma3nForConditionalGeneration": (transformers.Gemma3nConfig, WINDOW),
    "Cohere2VisionForConditionalGeneration": (transformers.Cohere2VisionConfig, WINDOW),
    "Llama4ForConditionalGeneration": (transformers.Llama4Config, "a local chunk only"),
    "MllamaForConditionalGeneration": (transformers.MllamaConfig, "cross attention"),
    "Qwen3_5ForConditionalGeneration": (Qwen3_5Config, STATE),
    "Lfm2VlForConditionalGeneration": (transformers.Lfm2VlConfig, STATE),
    "CLIPModel": (transformers.CLIPConfig, "it generates no text"),
    "LlamaForCausalLM": (transformers.LlamaConfig, "it takes no images"),
}
UNTESTED = {
    "Glm4vForConditionalGeneration": transformers.Glm4vConfig,
    "Qwen3VLMoeForConditionalGeneration": transformers.Qwen3VLMoeConfig,
    "LlavaForConditionalGeneration": transformers.LlavaConfig,
}
TESTED = {
    "Qwen2VLForConditionalGeneration": transformers.Qwen2VLConfig,
    "Qwen2_5_VLForConditionalGeneration": transformers.Qwen2_5_VLConfig,
    "Qwen3VLForConditionalGeneration": transformers.Qwen3VLConfig,
}


def model_of(path: Path, architecture: str, config: PreTrainedConfig, **options) -> ModelConfig:
    """What the host makes of a directory that holds nothing but config.json."""
    config.architectures = [architecture]
    config.save_pretrained(path)
    return ModelConfig(str(path), dtype="bfloat16", **options)


def refusal(model: ModelConfig, path: Path) -> str:
    with pytest.raises(RotateKError) as error:
        check_model(model, str(path))
    message = str(error.value)
    assert message.startswith(
        f"--enable-rotatek cannot serve {path} ({model.hf_config.architectures[0]}): "
    )
    assert message.endswith(", or drop --enable-rotatek.")
    return message.split("): ", 1)[1].split("; ")[0]


@pytest.mark.parametrize("architecture", REFUSED)
def test_other_attention_is_refused_by_its_kind(tmp_path, architecture):
    make_config, why = REFUSED[architecture]
    assert why in refusal(model_of(tmp_path, architecture, make_config()), tmp_path)


def test_a_decoder_that_stores_keys_itself_is_refused_inside_a_model_that_is_tested(tmp_path):
    model = model_of(tmp_path, "InternVLChatModel", internvl(qwen3_moe()))
    assert refusal(model, tmp_path) == "its attention stores Keys and Values itself, at full width"


def test_a_window_in_some_layers_is_refused_in_an_architecture_that_is_tested(tmp_path):
    assert WINDOW in refusal(
        model_of(tmp_path, "InternVLChatModel", internvl(windowed_qwen2())), tmp_path
    )


def test_a_window_that_the_host_ignores_is_none(models):
    path = str(models["llava_next_hf_mistral"])
    model = ModelConfig(path, dtype="bfloat16")
    assert model.sliding_window_size < model.context_len
    check_model(model, path)


def test_a_model_that_is_served_without_images_by_default_is_told_the_flag(tmp_path):
    config = transformers.Mistral3Config()
    model = model_of(tmp_path, "Mistral3ForConditionalGeneration", config, enable_multimodal=False)
    assert (
        refusal(model, tmp_path)
        == "SGLang serves it without images unless --enable-multimodal is given"
    )


@pytest.mark.parametrize("architecture", UNTESTED)
def test_plain_attention_of_an_untested_architecture_starts_with_a_warning(
    tmp_path, caplog, architecture
):
    model = model_of(tmp_path, architecture, UNTESTED[architecture]())
    with caplog.at_level(logging.WARNING, logger="sglang_rotatek"):
        check_model(model, str(tmp_path))
    (record,) = [record for record in caplog.records if record.name.startswith("sglang_rotatek")]
    assert f"not tested with {architecture}" in record.getMessage()
    assert ", ".join(TESTED_ARCHITECTURES) in record.getMessage()


@pytest.mark.parametrize("architecture", TESTED)
def test_a_tested_architecture_starts_without_a_word(tmp_path, caplog, architecture):
    check_model(model_of(tmp_path, architecture, TESTED[architecture]()), str(tmp_path))
    assert not [record for record in caplog.records if record.name.startswith("sglang_rotatek")]


def test_every_tiny_model_passes_the_gate_and_has_a_tested_architecture(models, caplog):
    architectures = set()
    for path in models.values():
        model = ModelConfig(str(path), dtype="bfloat16")
        check_model(model, str(path))
        architectures.add(model.hf_config.architectures[0])
    assert architectures == set(TESTED_ARCHITECTURES)
    assert not [record for record in caplog.records if record.name.startswith("sglang_rotatek")]


@pytest.mark.parametrize(
    "fields",
    [
        {"sliding_window_size": 128},
        {"is_cross_attention": True},
        {"attn_type": AttentionType.ENCODER_ONLY},
        {"pos_encoding_mode": "ALIBI"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_layer_of_another_kind_is_refused_by_its_name(fields):
    plain = RadixAttention(4, 128, 0.1, num_kv_heads=2, layer_id=0)
    check_layers(nn.ModuleList([plain, nn.Linear(2, 2)]))
    layers = nn.ModuleDict(
        {"plain": plain, "odd": RadixAttention(4, 128, 0.1, num_kv_heads=2, layer_id=1, **fields)}
    )
    with pytest.raises(
        RotateKError, match="in every layer, but odd of ModuleDict has another kind"
    ):
        check_layers(layers)


def test_keys_that_a_model_stored_itself_are_refused_at_the_first_forward():
    backend = object.__new__(RotateKTorchBackend)
    layer = RadixAttention(4, 128, 0.1, num_kv_heads=2, layer_id=7)
    with pytest.raises(RotateKError, match="the attention of layer 7 stores them before"):
        backend.forward(None, None, None, layer, None, save_kv_cache=False)
