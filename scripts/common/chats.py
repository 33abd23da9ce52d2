"""Random image chats from a seed, and a client that holds them with an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import dataclass, field
from typing import Any

from openai import AsyncOpenAI
from pictures import data_url, picture
from routing import routing_headers

QUESTIONS = (
    "What is in the picture?",
    "And what colour is it?",
    "Which word is largest?",
    "Count the shapes.",
    "Why?",
)
SIZES = ((112, 112), (168, 224), (280, 140), (336, 336))
REQUEST_SECONDS = 120


@dataclass
class Turn:
    """One finished turn: all messages that were sent, and what came back."""

    chat: int
    number: int
    messages: list[dict[str, Any]]
    text: str
    logprobs: list[float]
    prompt_tokens: int
    cached_tokens: int


@dataclass
class Chat:
    """User turns, in order. ``abort_turn``: the turn after whose first token the client hangs
    up."""

    number: int
    turns: list[list[dict[str, Any]]]
    abort_turn: int | None = None
    done: list[Turn] = field(default_factory=list)


def image_part(seed: int, size: tuple[int, int], modality: str | None = None) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": data_url(picture(seed, size))}}
    return part | ({"modalities": modality} if modality else {})


def random_chat(
    number: int, seed: int, *, shared_images: int = 8, max_images: int = 3, abort_share: float = 0.0
) -> Chat:
    """1-3 turns with 0 to ``max_images`` images in all, each drawn from ``shared_images`` pictures
    or new."""
    draw = random.Random(f"{seed}/{number}")
    turns: list[list[dict[str, Any]]] = [[] for _ in range(draw.randint(1, 3))]
    images = draw.randint(0, max_images)
    for _ in range(images):
        picture_seed = (
            draw.randrange(shared_images) if draw.random() < 0.6 else 1000 + draw.randrange(1 << 30)
        )
        size = SIZES[picture_seed % len(SIZES)]
        draw.choice(turns).append(
            image_part(picture_seed, size, "multi-images" if images > 1 else None)
        )
    for turn in turns:
        question = " ".join(draw.choice(QUESTIONS) for _ in range(draw.randint(1, 3)))
        turn.append({"type": "text", "text": question})
    abort_turn = draw.randrange(len(turns)) if draw.random() < abort_share else None
    return Chat(number, turns, abort_turn)


def text_chat(number: int, seed: int, *, abort_share: float = 0.0) -> Chat:
    """2-4 turns of text alone, long and short ones, of which some begin as others do."""
    draw = random.Random(f"{seed}/text/{number}")
    turns = [
        [
            {
                "type": "text",
                "text": " ".join(
                    draw.choice(QUESTIONS) for _ in range(draw.choice((1, 3, 12, 30)))
                ),
            }
        ]
        for _ in range(draw.randint(2, 4))
    ]
    abort_turn = draw.randrange(len(turns)) if draw.random() < abort_share else None
    return Chat(number, turns, abort_turn)


def connect(base_url: str, seconds: float = REQUEST_SECONDS) -> AsyncOpenAI:
    """A client of an OpenAI-compatible server that gives up a request after ``seconds`` of silence
    and repeats none, so that what a server fails to answer is seen."""
    return AsyncOpenAI(
        base_url=f"{base_url}/v1",
        api_key=os.environ.get("OPENAI_API_KEY") or "none",
        timeout=seconds,
        max_retries=0,
    )


async def complete(
    client: AsyncOpenAI,
    messages: list[dict[str, Any]],
    max_tokens: int,
    headers: dict[str, str] | None = None,
) -> dict[str, Any]:
    """One greedy completion with log-probabilities, as the JSON object that the server sent;
    raises openai.APIStatusError with the server's text."""
    reply = await client.chat.completions.create(
        model="default",
        messages=messages,
        temperature=0,
        max_tokens=max_tokens,
        logprobs=True,
        extra_body={"ignore_eos": True},
        extra_headers=headers,
    )
    return reply.model_dump()


async def hang_up(
    client: AsyncOpenAI, messages: list[dict[str, Any]], headers: dict[str, str]
) -> None:
    """Start a long answer and drop the connection after the first piece of it."""
    async with await client.chat.completions.create(
        model="default",
        messages=messages,
        max_tokens=64,
        stream=True,
        extra_body={"ignore_eos": True},
        extra_headers=headers,
    ) as pieces:
        async for _ in pieces:
            break


async def hold_chat(client: AsyncOpenAI, chat: Chat, max_tokens: int) -> None:
    """Hold ``chat`` turn by turn and record each finished turn in it."""
    messages: list[dict[str, Any]] = []
    headers = routing_headers(f"chat {chat.number}")
    for number, parts in enumerate(chat.turns):
        messages.append({"role": "user", "content": parts})
        if number == chat.abort_turn:
            await hang_up(client, messages, headers)
            return
        reply = await complete(client, messages, max_tokens, headers)
        choice, usage = reply["choices"][0], reply["usage"]
        chat.done.append(
            Turn(
                chat.number,
                number,
                list(messages),
                choice["message"]["content"],
                [token["logprob"] for token in choice["logprobs"]["content"]],
                usage["prompt_tokens"],
                (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
            )
        )
        messages.append({"role": "assistant", "content": choice["message"]["content"]})


async def hold_chats(
    base_url: str, chats: list[Chat], *, concurrency: int, max_tokens: int, progress=None
) -> None:
    """Hold all chats, ``concurrency`` at a time. Raises the first error, a time-out of one request
    included."""
    gate = asyncio.Semaphore(concurrency)
    async with connect(base_url) as client:

        async def hold(chat: Chat) -> None:
            async with gate:
                await hold_chat(client, chat, max_tokens)
            if progress is not None:
                progress.update()

        async with asyncio.TaskGroup() as group:
            for chat in chats:
                group.create_task(hold(chat))
