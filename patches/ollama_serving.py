"""Ollama's API: pictures are answered, which the host leaves out silently, and a refused request
gets HTTP 400."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

from fastapi.responses import ORJSONResponse, StreamingResponse
from sglang.srt.entrypoints.ollama.protocol import OllamaMessage
from sglang.srt.entrypoints.ollama.serving import OllamaServing
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.managers.io_struct import GenerateReqInput

from .tokenizer_manager import RotateKTokenizerManager

if TYPE_CHECKING:
    from fastapi import Request
    from sglang.srt.entrypoints.ollama.protocol import OllamaChatRequest, OllamaGenerateRequest


class RotateKOllamaServing(OllamaServing):
    """The host's when RotateK is off."""

    async def handle_chat(self, request: OllamaChatRequest, raw_request: Request) -> Any:
        if not isinstance(self.tokenizer_manager, RotateKTokenizerManager):
            return await super().handle_chat(request, raw_request)
        if not any(message.images for message in request.messages):
            return await _answer(super().handle_chat(request, raw_request))
        respond = self._stream_chat_response if request.stream else self._generate_chat_response
        return await _answer(self._chat(request.messages, request, raw_request, respond))

    async def handle_generate(self, request: OllamaGenerateRequest, raw_request: Request) -> Any:
        if not isinstance(self.tokenizer_manager, RotateKTokenizerManager):
            return await super().handle_generate(request, raw_request)
        if not request.images:
            return await _answer(super().handle_generate(request, raw_request))
        messages = [OllamaMessage(role="user", content=request.prompt, images=request.images)]
        if request.system:
            messages.insert(0, OllamaMessage(role="system", content=request.system))
        respond = (
            self._stream_generate_response if request.stream else self._generate_generate_response
        )
        return await _answer(self._chat(messages, request, raw_request, respond))

    async def _chat(
        self,
        messages: list[OllamaMessage],
        request: OllamaChatRequest | OllamaGenerateRequest,
        raw_request: Request,
        respond: Callable[[GenerateReqInput, Request, str], Awaitable[Any]],
    ) -> Any:
        """``respond`` to a chat whose pictures stand before the text of their message, with the
        model's template."""
        chat = ChatCompletionRequest(
            model=request.model, messages=[_openai_message(message) for message in messages]
        )
        convert = raw_request.app.state.openai_serving_chat._convert_to_internal_request
        prompt, _ = await asyncio.to_thread(convert, chat, raw_request)
        sampling_params = {"stop": prompt.sampling_params.get("stop")}
        generate = GenerateReqInput(
            text=prompt.text,
            image_data=prompt.image_data,
            modalities=prompt.modalities,
            sampling_params=sampling_params
            | self._convert_options_to_sampling_params(request.options),
            stream=request.stream,
        )
        return await respond(generate, raw_request, self.tokenizer_manager.served_model_name)


def _openai_message(message: OllamaMessage) -> dict:
    """A picture is base64 without a header, which the host takes for an address as well."""
    pictures = [
        {"type": "image_url", "image_url": {"url": picture}} for picture in message.images or ()
    ]
    return {"role": message.role, "content": [*pictures, {"type": "text", "text": message.content}]}


async def _answer(answer: Awaitable[Any]) -> Any:
    """``answer`` once it has begun: a stream's first chunk tells whether the request was
    refused."""
    try:
        response = await answer
        if isinstance(response, StreamingResponse):
            chunks = aiter(response.body_iterator)
            response.body_iterator = _stream(await anext(chunks), chunks)
        return response
    except ValueError as error:
        return ORJSONResponse({"error": str(error)}, status_code=400)


async def _stream(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield first
    async for chunk in rest:
        yield chunk
