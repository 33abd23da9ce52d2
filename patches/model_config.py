"""Make SGLang know LLaVA-NeXT in the Hugging Face layout, in every process that reads the model's configuration."""

from __future__ import annotations

LLAVA_NEXT = "LlavaNextForConditionalGeneration"


def from_server_args(original, server_args, *args, **kwargs):
    if getattr(server_args, "native_llava_next", False) or getattr(server_args, "enable_rotatek", False):
        register_llava_next()
    return original(server_args, *args, **kwargs)


def register_llava_next() -> None:
    """Add model and processor to the host's registries, once."""
    from sglang.srt.configs.model_config import multimodal_model_archs
    from sglang.srt.managers.multimodal_processor import PROCESSOR_MAPPING
    from sglang.srt.models.registry import ModelRegistry

    if LLAVA_NEXT in multimodal_model_archs:
        return
    from sglang_rotatek.models.llava_next import LlavaNextForConditionalGeneration
    from sglang_rotatek.models.llava_next_processor import LlavaNextProcessor

    ModelRegistry.models[LLAVA_NEXT] = LlavaNextForConditionalGeneration
    PROCESSOR_MAPPING[LlavaNextForConditionalGeneration] = LlavaNextProcessor
    multimodal_model_archs.append(LLAVA_NEXT)
