"""Soak a RotateK server: phases of text chats and of image chats on a tiny memory, aborts, shared
images, small chunks.

    python scripts/eval/soak.py MODEL --chats 2000
    python scripts/eval/soak.py MODEL --chats 2000 --gpu   bf16, overlapped schedule, CUDA graphs

Starts its own server with exact bases (rank = head_dim; without --gpu in float32), so that every
answer can be held to a cold rerun of the same prompt, whatever was evicted, shared, cut or
retracted before. Memory moves between text and images at each change of phase: after every image
phase the images must have found room. Exit 0 when no request failed or hung, nothing is left of any
request at the end, and all reruns agree: in bf16, where near-ties may flip, all but a few.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import requests
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

from chats import Chat, Turn, complete, connect, hold_chats, random_chat, text_chat
from server_process import ServerProcess, free_port

EXACT = ["--enable-rotatek", "--rotatek-key-bits", "16", "--rotatek-keep-ratio", "1.0"]
POOL_FLAGS = [
    "--enable-rotatek",
    *("--rotatek-visual-fraction", "0.7"),
    *("--rotatek-min-image-tokens", "8"),
    *("--rotatek-segment-tokens", "48"),
    *("--dtype", "float32"),
    *("--max-total-tokens", "6000"),
    *("--chunked-prefill-size", "64"),
    *("--max-running-requests", "16"),
    # Admits too much on purpose, so that requests are retracted.
    *("--schedule-conservativeness", "0.05"),
]
SERVER_FLAGS = [*POOL_FLAGS, *EXACT]
SERVER_ENVIRONMENT = {"SGLANG_ROTATEK_DEBUG": "1"}
# With the memory's share of text at its default, and no debug checks, which read the device.
GPU_FLAGS = [
    *(*EXACT, "--rotatek-min-image-tokens", "8", "--dtype", "bfloat16"),
    *("--max-total-tokens", "6000", "--chunked-prefill-size", "64", "--max-running-requests", "16"),
    *("--schedule-conservativeness", "0.05"),
]
PHASE_CHATS = 50  # of text, then as many of images
FLIPPED_SHARE = 0.25  # of bf16 answers of 24 tokens on random weights
SAME_LOGPROB = 1e-3  # float32 sums in another order; greedy near-ties below this may flip a token


def rotatek_info(base_url: str) -> dict:
    """The RotateK fields of /server_info."""
    info = requests.get(f"{base_url}/server_info", timeout=30).json()
    return info["internal_states"][0]["rotatek"]


def flush(base_url: str, seconds: float = 30) -> None:
    """Empty the cache; retried, since the server refuses for a moment after its last answer.
    TimeoutError when a request is still in the server after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not requests.post(f"{base_url}/flush_cache", timeout=30).ok:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the server still holds a request after {seconds:.0f} s")
        time.sleep(0.02)


def wait_for_check(base_url: str, seconds: float = 10) -> dict:
    """The info after the idle server has checked its pools once more; TimeoutError when it does
    not."""
    before = rotatek_info(base_url)["integrity_checks"]
    deadline = time.monotonic() + seconds
    flush(base_url)
    while time.monotonic() < deadline:
        info = rotatek_info(base_url)
        if info["integrity_checks"] > before:
            return info
        time.sleep(0.1)
    raise TimeoutError(
        f"the server ran no integrity check within {seconds:.0f} s; it is not idle, or not in "
        "debug mode"
    )


async def disagreements(
    base_url: str, turns: list[Turn], max_tokens: int, is_exact: bool
) -> list[str]:
    """Rerun each turn's prompt on an empty cache; a sentence for each answer that differs."""
    found = []
    async with connect(base_url) as client:
        for turn in tqdm(turns, desc="cold reruns", file=sys.stderr, disable=None):
            flush(base_url)
            choice = (await complete(client, turn.messages, max_tokens))["choices"][0]
            cold = [token["logprob"] for token in choice["logprobs"]["content"]]
            is_off = is_exact and any(
                abs(a - b) > SAME_LOGPROB for a, b in zip(cold, turn.logprobs, strict=True)
            )
            if choice["message"]["content"] != turn.text or is_off:
                found.append(
                    f"chat {turn.chat} turn {turn.number}: {turn.text!r} in the soak, "
                    f"{choice['message']['content']!r} cold"
                )
    return found


def phases(chats: int, seed: int) -> list[list[Chat]]:
    """Phases of chats of text and of chats with images, by turns."""
    numbers = range(chats)
    makers = (text_chat, random_chat)
    return [
        [
            makers[at // PHASE_CHATS % 2](number, seed, abort_share=0.15)
            for number in numbers[at : at + PHASE_CHATS]
        ]
        for at in range(0, chats, PHASE_CHATS)
    ]


def soak(
    base_url: str,
    *,
    chats: int,
    concurrency: int,
    seed: int,
    reruns: int,
    max_tokens: int,
    is_exact: bool = True,
) -> list[str]:
    """Run the soak; returns a sentence for each thing that went wrong. ``is_exact``: of a float32
    server in debug mode."""
    held: list[Chat] = []
    problems: list[str] = []
    start = time.monotonic()
    with tqdm(total=chats, desc="chats", file=sys.stderr, disable=None) as progress:
        for phase in phases(chats, seed):
            before = rotatek_info(base_url)["images_compressed"]
            asyncio.run(
                hold_chats(
                    base_url,
                    phase,
                    concurrency=concurrency,
                    max_tokens=max_tokens,
                    progress=progress,
                )
            )
            held += phase
            has_images = any(
                part["type"] != "text" for chat in phase for turn in chat.turns for part in turn
            )
            if has_images and rotatek_info(base_url)["images_compressed"] == before:
                problems.append(
                    f"no image of chats {phase[0].number}-{phase[-1].number} found room after the "
                    "text before"
                )
    seconds = time.monotonic() - start
    turns = [turn for chat in held for turn in chat.done]
    before_flush = rotatek_info(base_url)
    if is_exact:
        info = wait_for_check(base_url)
    else:
        flush(base_url)
        info = rotatek_info(base_url)
    problems += [
        f"{name} is {info[name]} after the flush, expected 0"
        for name in (
            "text_slots_used",
            "visual_slots_used",
            "bases_used",
            "slabs_of_text",
            "slabs_of_images",
            "host_slabs_used",
        )
        if info.get(name)
    ]
    sample = random.Random(seed).sample(turns, min(reruns, len(turns)))
    different = asyncio.run(disagreements(base_url, sample, max_tokens, is_exact))
    if is_exact or len(different) > FLIPPED_SHARE * len(sample):
        problems += different
    cached = sum(turn.cached_tokens for turn in turns) / max(
        1, sum(turn.prompt_tokens for turn in turns)
    )
    print(
        f"{chats} chats, {len(turns)} turns, {sum(chat.abort_turn is not None for chat in held)} "
        f"hung up in {seconds:.1f} s; {cached:.0%} of prompt tokens cached; {len(sample)} cold "
        f"reruns, {len(different)} otherwise; {info['integrity_checks']} integrity checks"
    )
    print(json.dumps(before_flush))
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", type=Path, help="a model directory, e.g. of scripts/models/make_tiny_model.py"
    )
    parser.add_argument("--chats", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reruns", type=int, default=100, help="turns to repeat on an empty cache")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument(
        "--base-url",
        help="a running server in debug mode (SGLANG_ROTATEK_DEBUG=1) instead of an own one",
    )
    parser.add_argument(
        "--log", type=Path, default=Path(tempfile.gettempdir()) / "rotatek-soak.log"
    )
    parser.add_argument(
        "--gpu", action="store_true", help="a server in bf16 on a GPU, without debug checks"
    )
    parser.add_argument(
        "--server-flags", nargs=argparse.REMAINDER, default=[], help="more flags for the server"
    )
    args = parser.parse_args()
    options = {
        name: getattr(args, name)
        for name in ("chats", "concurrency", "seed", "reruns", "max_tokens")
    }
    options["is_exact"] = not args.gpu
    if args.base_url:
        problems = soak(args.base_url, **options)
    else:
        flags = (GPU_FLAGS if args.gpu else SERVER_FLAGS) + args.server_flags
        environment = {} if args.gpu else SERVER_ENVIRONMENT
        with ServerProcess(args.model, free_port(), flags, args.log, environment) as server:
            problems = soak(server.url, **options)
            if not server.is_alive():
                problems.append(f"the server died:\n{server.log_tail()}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
