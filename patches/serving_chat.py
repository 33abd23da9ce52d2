"""Chat: what a message quotes of a placeholder is text, and takes no picture."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat

from sglang_rotatek.requests.placeholders import as_plain_text

if TYPE_CHECKING:
    from sglang.srt.entrypoints.openai.protocol import (
        ChatCompletionRequest,
        MessageProcessingResult,
    )

# Attributes of the host's processors that hold the ids of placeholders and of the tokens around
# them.
TOKEN_ID_ATTRIBUTES = (
    "IM_START_TOKEN_ID",
    "IM_END_TOKEN_ID",
    "image_token_id",
    "img_start_token_id",
    "img_end_token_id",
)


class RotateKServingChat(OpenAIServingChat):
    """The host's, for chat completions and Anthropic messages."""

    def _process_messages(
        self, request: ChatCompletionRequest, is_multimodal: bool, **kwargs: Any
    ) -> MessageProcessingResult:
        processor = self.tokenizer_manager.mm_processor
        if is_multimodal and processor is not None:
            placeholders, patterns = _placeholders(processor, self.tokenizer_manager.tokenizer)
            for message in request.messages:
                _quote(message, placeholders, patterns)
        return super()._process_messages(request, is_multimodal, **kwargs)


def _quote(message: Any, placeholders: set[str], patterns: list[re.Pattern]) -> None:
    if isinstance(message.content, str):
        message.content = as_plain_text(message.content, placeholders, patterns)
    for part in message.content if isinstance(message.content, list) else ():
        if isinstance(getattr(part, "text", None), str):
            part.text = as_plain_text(part.text, placeholders, patterns)


def _placeholders(processor: Any, tokenizer: Any) -> tuple[set[str], list[re.Pattern]]:
    """The texts that the model's tokenizer or processor would read as a place of a picture, video
    or audio clip."""
    tokens = getattr(processor, "mm_tokens", None)
    kinds = ("image", "video", "audio")
    ids = [getattr(tokens, f"{kind}_token_id", None) for kind in kinds]
    ids += [getattr(processor, name, None) for name in TOKEN_ID_ATTRIBUTES]
    texts = set(tokenizer.convert_ids_to_tokens([each for each in ids if each is not None]))
    patterns = [getattr(tokens, f"{kind}_token_regex", None) for kind in kinds]
    if tokens is None:  # LLaVA in its original layout, whose chat templates write this
        texts.add("<image>")
    return {text for text in texts if text}, [pattern for pattern in patterns if pattern]
