"""Random image chats from a seed, and a client that holds them with an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

import aiohttp
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


async def complete(
    session: aiohttp.ClientSession,
    base_url: str,
    messages: list[dict[str, Any]],
    max_tokens: int,
    headers: dict[str, str] | None = None,
) -> dict[str, Any]:
    """One greedy completion with log-probabilities; raises aiohttp.ClientResponseError with the
    server's text."""
    body = {
        "model": "default",
        "messages": messages,
        "temperature": 0,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "logprobs": True,
    }
    async with session.post(
        f"{base_url}/v1/chat/completions", json=body, headers=headers
    ) as response:
        if response.status != 200:
            text = (await response.text())[:500]
            raise aiohttp.ClientResponseError(
                response.request_info, response.history, status=response.status, message=text
            )
        return await response.json()


async def hang_up(
    session: aiohttp.ClientSession,
    base_url: str,
    messages: list[dict[str, Any]],
    headers: dict[str, str],
) -> None:
    """Start a long answer and drop the connection after the first piece of it."""
    body = {
        "model": "default",
        "messages": messages,
        "max_tokens": 64,
        "ignore_eos": True,
        "stream": True,
    }
    async with session.post(
        f"{base_url}/v1/chat/completions", json=body, headers=headers
    ) as response:
        await response.content.readline()


async def hold_chat(
    session: aiohttp.ClientSession, base_url: str, chat: Chat, max_tokens: int
) -> None:
    """Hold ``chat`` turn by turn and record each finished turn in it."""
    messages: list[dict[str, Any]] = []
    headers = routing_headers(f"chat {chat.number}")
    for number, parts in enumerate(chat.turns):
        messages.append({"role": "user", "content": parts})
        if number == chat.abort_turn:
            await hang_up(session, base_url, messages, headers)
            return
        reply = await complete(session, base_url, messages, max_tokens, headers)
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
    timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
    async with aiohttp.ClientSession(
        timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
    ) as session:

        async def hold(chat: Chat) -> None:
            async with gate:
                await hold_chat(session, base_url, chat, max_tokens)
            if progress is not None:
                progress.update()

        async with asyncio.TaskGroup() as group:
            for chat in chats:
                group.create_task(hold(chat))
