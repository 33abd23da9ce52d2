"""Which models RotateK serves, told from the host's ModelConfig: those with plain attention, by
whatever name."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.configs.model_config import (
    AttentionArch,
    ModelConfig,
    is_deepseek_dsa,
    is_minimax_sparse,
    is_multimodal_model,
)
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from torch import nn

from sglang_rotatek.config import RotateKError
from sglang_rotatek.models import LLAVA_NEXT

logger = logging.getLogger(__name__)

TESTED_ARCHITECTURES = (
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "InternVLChatModel",
    "LlavaLlamaForCausalLM",
    "LlavaQwenForCausalLM",
    LLAVA_NEXT,
)
# Model types of decoders that store K and V themselves while they apply RoPE (models/utils.py,
# enable_fused_set_kv_buffer): on CUDA they would write rows of full width at the ids of narrow
# ones. Those of Qwen3-VL-MoE and Qwen3-Omni, which have M-RoPE, do not. What is missing here is
# refused at its first forward.
STORES_KV_ITSELF = ("qwen3_moe", "gpt_oss")


def _window(model: ModelConfig) -> bool:
    """Whether some layer has a sliding window. ``sliding_window`` alone says nothing: Llama,
    Mistral and Qwen2 of the host ignore it."""
    return model.is_hybrid_swa or "sliding_attention" in (
        getattr(model.hf_text_config, "layer_types", None) or ()
    )


def _local(model: ModelConfig) -> bool:
    return model.attention_chunk_size is not None or model.is_local_attention_model


def _sparse(model: ModelConfig) -> bool:
    return (
        is_minimax_sparse(model.hf_config)
        or is_deepseek_dsa(model.hf_config)
        or hasattr(model.hf_config, "dual_chunk_attention_config")
    )


# What is not plain multi-head or grouped-query attention over one KV pool, and why that rules
# RotateK out. First match.
UNSUITED: tuple[tuple[Callable[[ModelConfig], bool], str], ...] = (
    (
        lambda model: model.is_encoder_decoder,
        "its images enter by cross attention, not as tokens of the prompt",
    ),
    (
        lambda model: (
            mambaish_config(model) is not None or model.attention_arch == AttentionArch.SSM
        ),
        "some of its layers keep a recurrent state (linear attention, Mamba) instead of Keys",
    ),
    (
        _sparse,
        "its attention is sparse: it selects tokens by Keys that image tokens would not have",
    ),
    (
        lambda model: model.attention_arch != AttentionArch.MHA,
        "its attention is multi-head latent attention (MLA), which stores no Keys per head",
    ),
    (_local, "some of its layers attend to a local chunk only"),
    (_window, "some of its layers have a sliding window"),
    (lambda model: model.has_attention_sinks, "its attention has learned sinks"),
    (
        lambda model: model.hf_text_config.model_type in STORES_KV_ITSELF,
        "its attention stores Keys and Values itself, at full width",
    ),
    (lambda model: not model.is_generation, "it generates no text"),
    (
        lambda model: (
            not model.is_multimodal and is_multimodal_model(model.hf_config.architectures)
        ),
        "SGLang serves it without images unless --enable-multimodal is given",
    ),
    (lambda model: not model.is_multimodal, "it takes no images"),
)


def check_model(model: ModelConfig, model_path: str) -> None:
    """Raise RotateKError for a model that RotateK cannot serve; warn of one that no test covers."""
    architecture = (model.hf_config.architectures or ["none"])[0]
    tested = ", ".join(TESTED_ARCHITECTURES)
    for is_so, why in UNSUITED:
        if is_so(model):
            raise RotateKError(
                f"--enable-rotatek cannot serve {model_path} ({architecture}): {why}; serve a "
                f"model with plain attention (tested: {tested}), or drop --enable-rotatek."
            )
    if architecture not in TESTED_ARCHITECTURES:
        logger.warning(
            "RotateK is not tested with %s (%s), but its attention is of the kind that RotateK "
            "serves. Tested: %s.",
            architecture,
            model_path,
            tested,
        )


def check_layers(model: nn.Module) -> None:
    """Raise RotateKError for a loaded model with an attention layer of a kind that its
    configuration does not tell."""
    for name, layer in model.named_modules():
        if not isinstance(layer, RadixAttention):
            continue
        is_plain = (
            layer.attn_type == AttentionType.DECODER
            and layer.sliding_window_size == -1
            and not layer.is_cross_attention
            and layer.pos_encoding_mode == "NONE"
        )
        if not is_plain:
            raise RotateKError(
                "--enable-rotatek needs causal attention over the whole context in every layer, "
                f"but {name} of {type(model).__name__} has another kind (attn_type "
                f"{layer.attn_type.value}, sliding_window_size {layer.sliding_window_size}, "
                f"is_cross_attention {layer.is_cross_attention}, pos_encoding_mode "
                f"{layer.pos_encoding_mode}); serve another model, or drop --enable-rotatek."
            )
