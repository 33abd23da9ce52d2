"""Models that SGLang lacks, registered from the plugin."""

from __future__ import annotations

LLAVA_NEXT = "LlavaNextForConditionalGeneration"


def register_llava_next() -> None:
    """Make the host know LLaVA-NeXT in the Hugging Face layout, model and processor. Once a
    process, before it looks the model up."""
    from sglang.srt.configs.model_config import multimodal_model_archs
    from sglang.srt.managers.multimodal_processor import PROCESSOR_MAPPING
    from sglang.srt.models.registry import ModelRegistry

    if LLAVA_NEXT in multimodal_model_archs:
        return
    from .llava_next import LlavaNextForConditionalGeneration
    from .llava_next_processor import LlavaNextProcessor

    ModelRegistry.models[LLAVA_NEXT] = LlavaNextForConditionalGeneration
    PROCESSOR_MAPPING[LlavaNextForConditionalGeneration] = LlavaNextProcessor
    multimodal_model_archs.append(LLAVA_NEXT)
