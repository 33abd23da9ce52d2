"""What the tokenizer process makes of a request; with the host's classes, without a server."""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
from itertools import pairwise
from types import SimpleNamespace

import pytest
import requests
import torch
from PIL import Image, UnidentifiedImageError
from sglang.srt.entrypoints.ollama.protocol import OllamaMessage
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.managers.multi_tokenizer_mixin import TokenizerWorker
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.multimodal.processors.executor import MultimodalProcessorExecutor

from sglang_rotatek.patches import ollama_serving, serving_chat, tokenizer_manager
from sglang_rotatek.patches.tokenizer_manager import (
    FutureSafeExecutor,
    RotateKTokenizerManager,
    RotateKTokenizerWorker,
    is_client_error,
)


def chain(*errors: BaseException) -> BaseException:
    """The last error, raised while the one before was handled, and so on."""
    for earlier, later in pairwise(errors):
        later.__context__ = earlier
    return errors[-1]


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "no such file"),
        IsADirectoryError(errno.EISDIR, "is a directory"),
        UnidentifiedImageError("cannot identify image file"),
        OSError("image file is truncated"),
        Image.DecompressionBombError("exceeds limit"),
        SyntaxError("broken PNG file"),
        requests.exceptions.ConnectTimeout("no answer"),
        requests.exceptions.HTTPError("404"),
        chain(
            FileNotFoundError(errno.ENOENT, "no such file"),
            RuntimeError("while loading"),
            RuntimeError("outer"),
        ),
    ],
    ids=repr,
)
def test_an_error_of_what_the_client_sent(error):
    assert is_client_error(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error"),
        AttributeError("a mistake of the code"),
        OSError(errno.EMFILE, "too many open files"),
        OSError(errno.ENOSPC, "no space left on device"),
        TimeoutError(),
        chain(AttributeError("a mistake of the code"), RuntimeError("while loading")),
    ],
    ids=repr,
)
def test_an_error_of_the_server_stays_its_own(error):
    assert not is_client_error(error)


def test_a_processor_that_raises_stop_iteration_ends_the_request():
    def process(grids, processor):
        return next(iter(grids))

    async def run(grids):
        executor = FutureSafeExecutor(MultimodalProcessorExecutor(dict, 1))
        try:
            return await asyncio.wait_for(executor.run(process, grids), timeout=10)
        finally:
            executor.shutdown()

    assert asyncio.run(run([3])) == 3
    with pytest.raises(
        ValueError, match="more image or video placeholders than there are pictures"
    ):
        asyncio.run(run([]))


def test_the_hosts_executor_alone_would_wait_for_ever():
    """The reason of FutureSafeExecutor; without it no future can carry the error."""
    future = concurrent.futures.Future()
    future.set_exception(StopIteration())

    async def wait():
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        await asyncio.wait_for(asyncio.wrap_future(future), timeout=0.2)

    with pytest.raises((TimeoutError, TypeError, RuntimeError)):
        asyncio.run(wait())


def test_tokenizer_workers_are_the_hosts_and_ours():
    assert RotateKTokenizerWorker.__mro__[1:4] == (
        RotateKTokenizerManager,
        TokenizerWorker,
        TokenizerManager,
    )


@pytest.mark.parametrize(
    ("pictures", "modalities", "expected"),
    [
        (["a"], [], ["image"]),
        (["a"], ["image"], ["image"]),
        (["a", "b"], None, ["multi-images", "multi-images"]),
        (["a", "b"], ["image", "image"], ["multi-images", "multi-images"]),
        (["a", "b"], ["video"], ["video"]),
        (["a", "b"], ["multi-images"], ["multi-images"]),
        (["a"] * 17, ["multi-images"], ["video"]),
    ],
)
def test_llava_takes_all_pictures_of_a_request(pictures, modalities, expected):
    request = SimpleNamespace(image_data=pictures, modalities=modalities, session_params=None)
    tokenizer_manager._prepare_for_llava(request)
    assert request.modalities == expected


def test_llava_takes_no_pictures_in_a_session():
    session = {"id": "1"}
    tokenizer_manager._prepare_for_llava(
        SimpleNamespace(image_data=None, modalities=None, session_params=session)
    )
    request = SimpleNamespace(image_data=["a"], modalities=None, session_params=session)
    with pytest.raises(ValueError, match="pictures do not work in a session.*send the whole chat"):
        tokenizer_manager._prepare_for_llava(request)


def test_a_picture_may_be_an_address_with_options():
    (picture,) = tokenizer_manager._pictures([{"url": "data:,", "detail": "low", "fps": 2}])
    assert (picture.url, picture.detail, picture.max_dynamic_patch) == ("data:,", "low", None)
    for kept in (None, "data:,", {"format": "processor_output"}, {"feature": 1, "url": 2}):
        assert tokenizer_manager._pictures(kept) is kept


def test_placeholders_of_a_prompt_are_counted_by_text_or_ids():
    manager = SimpleNamespace(
        mm_processor=SimpleNamespace(
            mm_tokens=SimpleNamespace(image_token_id=7, video_token_id=8, audio_token_id=None)
        ),
        tokenizer=SimpleNamespace(convert_ids_to_tokens={7: "<pad>", 8: "<video>"}.get),
    )

    def count(text=None, input_ids=None):
        request = SimpleNamespace(text=text, input_ids=input_ids)
        return RotateKTokenizerManager._placeholders_of(manager, request)

    assert count(text="<pad> and <pad> in a <video>") == {"image": 2, "video": 1}
    assert count(input_ids=[7, 1, 8, 7, 7]) == {"image": 3, "video": 1}
    assert count() == {}


def test_chat_messages_quote_placeholders():
    messages = [
        {"role": "system", "content": "never write <|image_pad|>"},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "https://example.org/<image>.png"}},
                {"type": "text", "text": "what is <image>?"},
            ],
        },
        {"role": "assistant", "content": None},
    ]
    request = ChatCompletionRequest(model="m", messages=messages)
    for message in request.messages:
        serving_chat._quote(message, {"<|image_pad|>", "<image>"}, [])
    system, user, assistant = request.messages
    assert system.content == "never write < |image_pad|>"
    assert user.content[0].image_url.url == "https://example.org/<image>.png"
    assert user.content[1].text == "what is < image>?"
    assert assistant.content is None


def test_an_ollama_message_has_its_pictures_before_its_text():
    message = ollama_serving._openai_message(
        OllamaMessage(role="user", content="what?", images=["AAAA", "BBBB"])
    )
    assert message["role"] == "user"
    assert [part["type"] for part in message["content"]] == ["image_url", "image_url", "text"]
    assert message["content"][1]["image_url"]["url"] == "BBBB"


@pytest.mark.parametrize(
    ("data", "number"), [(None, 0), ("a", 1), (["a", "b"], 2), (["a", None], 1), ([], 0)]
)
def test_how_many_pictures_a_field_holds(data, number):
    assert tokenizer_manager._number(data) == number


def test_the_pictures_of_a_request_are_loaded_in_one_form():
    gray, processed = torch.zeros(1, 20, 30, dtype=torch.uint8), {"format": "processor_output"}

    async def load_mm_data(prompt, *, image_data):
        return SimpleNamespace(images=image_data, prompt=prompt)

    loaded = asyncio.run(
        tokenizer_manager._load_alike(load_mm_data, "text", image_data=[gray, processed])
    )
    assert (loaded.prompt, loaded.images[0].shape, loaded.images[1]) == (
        "text",
        (3, 20, 30),
        processed,
    )
    assert (
        asyncio.run(tokenizer_manager._load_alike(load_mm_data, "text", image_data=None)).images
        == []
    )
