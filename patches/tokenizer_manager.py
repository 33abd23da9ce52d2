"""The tokenizer process: what cannot be answered gets HTTP 400 with the reason, before the
scheduler sees it."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from PIL import Image
from sglang.srt.managers.multi_tokenizer_mixin import TokenizerWorker
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.utils import ImageData

from sglang_rotatek.pruning.layouts import layout_of
from sglang_rotatek.pruning.shrink import shrink
from sglang_rotatek.requests.pictures import alike
from sglang_rotatek.requests.placeholders import (
    Medium,
    check_boundaries,
    check_lengths,
    check_media,
    check_numbers,
    check_placeholders,
    check_token_ids,
    runs_of,
    with_single_placeholders,
)

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import (
        EmbeddingReqInput,
        GenerateReqInput,
        TokenizedEmbeddingReqInput,
        TokenizedGenerateReqInput,
    )
    from sglang.srt.managers.schedule_batch import MultimodalProcessorOutput
    from sglang.srt.managers.template_manager import TemplateManager
    from sglang.srt.server_args import PortArgs

    from .server_args import RotateKServerArgs
    from .serving_chat import RotateKServingChat

KINDS = ("image", "video", "audio")
# Pictures of a request that ``LlavaBaseForCausalLM.pad_input_ids`` reserves all their tokens for.
LLAVA_MANY = 16
# Errors of the operating system that the client's picture is not the reason of.
OUR_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)


def init_tokenizer_manager(
    original: Callable[..., tuple[TokenizerManager, TemplateManager]],
    server_args: RotateKServerArgs,
    port_args: PortArgs,
    TokenizerManagerClass: type[TokenizerManager] | None = None,
) -> tuple[TokenizerManager, TemplateManager]:
    if TokenizerManagerClass is None and server_args.enable_rotatek:
        TokenizerManagerClass = RotateKTokenizerManager
    return original(server_args, port_args, TokenizerManagerClass)


class RotateKTokenizerManager(TokenizerManager):
    """The host's. It raises ValueError, which every entry point answers with HTTP 400, where the
    host would hang, end the server, answer with HTTP 500, or leave out a picture silently."""

    @property
    def serving_chat_class(self) -> type[RotateKServingChat]:
        from .serving_chat import RotateKServingChat

        return RotateKServingChat

    def init_tokenizer_and_processor(self) -> None:
        from sglang.srt.multimodal.processors.internvl import InternVLProcessor
        from sglang.srt.multimodal.processors.llava import LlavaImageProcessor

        super().init_tokenizer_and_processor()
        self._processor_is_llava = isinstance(self.mm_processor, LlavaImageProcessor)
        self._processor_is_internvl = isinstance(self.mm_processor, InternVLProcessor)
        if self.server_args.rotatek_keep_tokens < 1:
            self._layout = layout_of(self.model_config.hf_config)
        executor = getattr(self.mm_processor, "mm_processor_executor", None)
        if executor is not None:
            self.mm_processor.mm_processor_executor = FutureSafeExecutor(executor)
        if self.mm_processor is not None:
            self.mm_processor.load_mm_data = partial(_load_alike, self.mm_processor.load_mm_data)

    async def _tokenize_one_request(
        self, obj: GenerateReqInput | EmbeddingReqInput
    ) -> TokenizedGenerateReqInput | TokenizedEmbeddingReqInput:
        if obj.input_ids is not None and obj.input_embeds is None:
            check_token_ids(obj.input_ids, self.model_config.vocab_size)
        given_ids, image_token_id = obj.input_ids, _token_ids(self.mm_processor).get("image")
        obj.image_data = _pictures(obj.image_data)
        if self._processor_is_llava:  # the model expands its placeholders in the scheduler
            _prepare_for_llava(obj)
        elif given_ids is not None and image_token_id is not None and obj.image_data:
            obj.input_ids = with_single_placeholders(
                given_ids, image_token_id, _number(obj.image_data)
            )
        if obj.contains_mm_input():
            check_numbers(self._placeholders_of(obj), _given(obj))
        try:
            tokenized = await super()._tokenize_one_request(obj)
        except Exception as error:
            if isinstance(error, ValueError) or not is_client_error(error):
                raise
            raise ValueError(str(error) or type(error).__name__) from error
        if obj.input_ids is not given_ids and image_token_id is not None:
            made_ids = getattr(obj, "unpruned_ids", tokenized.input_ids)
            check_lengths(runs_of(given_ids, image_token_id), runs_of(made_ids, image_token_id))
        return tokenized

    def _placeholders_of(self, obj: GenerateReqInput | EmbeddingReqInput) -> dict[str, int]:
        """How many placeholders of each kind the prompt has. Processors count on there being no
        more than inputs."""
        token_ids = _token_ids(self.mm_processor)
        if obj.input_ids is not None:
            return {kind: obj.input_ids.count(token_id) for kind, token_id in token_ids.items()}
        if not obj.text or self.tokenizer is None:
            return {}
        return {
            kind: obj.text.count(self.tokenizer.convert_ids_to_tokens(each))
            for kind, each in token_ids.items()
        }

    def _create_tokenized_object(
        self,
        obj: GenerateReqInput | EmbeddingReqInput,
        input_text: str,
        input_ids: list[int] | None,
        input_embeds: list[list[float]] | None = None,
        mm_inputs: MultimodalProcessorOutput | None = None,
        *args: Any,
    ) -> TokenizedGenerateReqInput | TokenizedEmbeddingReqInput:
        if input_ids is not None:
            self._check_media(obj, input_ids, mm_inputs)
            keep = self.server_args.rotatek_keep_tokens
            pruner = self.server_args.rotatek_token_pruner
            if mm_inputs and keep < 1:
                obj.unpruned_ids = input_ids
                input_ids = shrink(mm_inputs, list(input_ids), self._layout, keep, pruner)
        tokenized = super()._create_tokenized_object(
            obj, input_text, input_ids, input_embeds, mm_inputs, *args
        )
        if (getattr(tokenized.sampling_params, "beam_width", None) or 1) > 1:
            raise ValueError(
                f"beam_width {tokenized.sampling_params.beam_width} does not work with "
                "--enable-rotatek: beams copy rows of full-width Keys, and image tokens have "
                "none. Leave it out."
            )
        return tokenized

    def _check_media(
        self,
        obj: GenerateReqInput | EmbeddingReqInput,
        input_ids: list[int],
        mm_inputs: MultimodalProcessorOutput | None,
    ) -> None:
        items = mm_inputs.mm_items if mm_inputs else []
        if not self._processor_is_llava and any(item.offsets is None for item in items):
            return  # a model that finds the places by a rule of its own
        # To LLaVA the frames of a video are pictures.
        kinds = [
            "image" if self._processor_is_llava else item.modality.name.lower() for item in items
        ]
        media = [Medium(kind, item.offsets) for kind, item in zip(kinds, items, strict=True)]
        check_media(media, _given(obj))
        if media:
            check_placeholders(input_ids, media, _token_ids(self.mm_processor))
            # InternVL's model pads what lies between the two, and a stray one ends the server.
            if mm_inputs is not None and self._processor_is_internvl:
                check_boundaries(input_ids, media, mm_inputs.im_start_id, mm_inputs.im_end_id)


class RotateKTokenizerWorker(RotateKTokenizerManager, TokenizerWorker):
    """The same in each process of --tokenizer-worker-num; ``ServerArgs.get_tokenizer_worker_class``
    names it."""


async def _load_alike(
    load_mm_data: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any
) -> Any:
    """The host's, with pictures that one image processor can take together: on a GPU it decodes
    JPEG to tensors there, gray ones with one channel, and other formats to PIL images, which cannot
    be stacked with them."""
    loaded = await load_mm_data(*args, **kwargs)
    loaded.images = alike(loaded.images or [])
    return loaded


class FutureSafeExecutor:
    """An executor whose functions never raise StopIteration, which no future can carry: whoever
    waits for such a future waits for ever. Transformers processors raise it for more placeholders
    than pictures."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor

    async def run(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        return await self._executor.run(partial(_without_stop_iteration, function), *args, **kwargs)

    def shutdown(self) -> None:
        self._executor.shutdown()


def _without_stop_iteration(function: Callable, *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except StopIteration as error:
        raise ValueError(
            "the prompt has more image or video placeholders than there are pictures or videos: "
            "text that quotes a placeholder must not be sent as raw prompt text."
        ) from error


def is_client_error(error: BaseException | None) -> bool:
    """Whether what the client sent is the reason: a file that is not there or not a picture, an
    address that does not answer, too large a picture. The host wraps the first error in others."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(
            error, (ValueError, NotImplementedError, SyntaxError, Image.DecompressionBombError)
        ):
            return True
        if (
            isinstance(error, OSError)
            and not isinstance(error, TimeoutError)
            and error.errno not in OUR_ERRNOS
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _prepare_for_llava(obj: GenerateReqInput | EmbeddingReqInput) -> None:
    """LLaVA's processor drops all pictures but the first of a request that is not marked as one of
    several. Its model reserves a quarter of the tokens for each of many, as for the frames of a
    video, and writes them over each other unless they are marked so; and it ends the server at a
    later turn of a session with pictures."""
    pictures, modalities = _number(obj.image_data), getattr(obj, "modalities", None) or []
    if pictures and getattr(obj, "session_params", None):
        raise ValueError(
            "pictures do not work in a session with LLaVA in its original layout: send the whole "
            "chat each time; what was sent before is in the cache."
        )
    if pictures > LLAVA_MANY:
        modalities = ["video"]
    elif pictures > 1 and not {"multi-images", "video"} & set(modalities):
        modalities = ["multi-images"] * pictures
    obj.modalities = modalities or ["image"]


def _given(obj: GenerateReqInput | EmbeddingReqInput) -> dict[str, int]:
    """How many inputs of each kind the request has."""
    return {kind: _number(getattr(obj, f"{kind}_data", None)) for kind in KINDS}


def _pictures(data: Any) -> Any:
    """``image_data`` of a request; the host's processors do not read the form with an address and
    options."""
    if isinstance(data, list):
        return [_pictures(each) for each in data]
    if not isinstance(data, dict) or not isinstance(data.get("url"), str):
        return data
    return ImageData(
        **{
            field.name: data[field.name]
            for field in dataclasses.fields(ImageData)
            if field.name in data
        }
    )


def _number(data: Any) -> int:
    """How many pictures, videos or clips a request's field holds."""
    if data is None:
        return 0
    return sum(each is not None for each in data) if isinstance(data, list) else 1


def _token_ids(processor: Any) -> dict[str, int]:
    """The token that each kind of medium takes in the prompt, of those that the model has."""
    tokens = getattr(processor, "mm_tokens", None)
    ids = {kind: getattr(tokens, f"{kind}_token_id", None) for kind in KINDS}
    if tokens is None:
        ids["image"] = getattr(getattr(processor, "hf_config", None), "image_token_index", None)
    return {kind: token_id for kind, token_id in ids.items() if token_id is not None}
