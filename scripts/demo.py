"""Ask a real RotateK server about freshly drawn pictures, three turns each; what it answers, and
what was saved.

    scripts/demo.sh                           the trained models of scripts/models, both backbones
    scripts/demo.sh --backbone qwen2_5_vl     one backbone
    scripts/demo.sh --seed 7                  other pictures
    scripts/demo.sh --rotatek-key-bits 16     other flags go to the server

Exit code 0 only if, for every backbone, turn 2 took the image of turn 1 from the cache, the image's
Keys were stored narrow, and most answers were right.
"""

import argparse
import secrets
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import requests
from openai import OpenAI, OpenAIError

sys.path.insert(0, str(Path(__file__).resolve().parent / "common"))

from pictures import data_url
from routing import routing_headers
from server_process import ServerError, ServerProcess, free_port
from tasks import FAMILIES, HELD_OUT_SEED, Picture, make_picture

SCRIPTS = Path(__file__).resolve().parent
CACHE = SCRIPTS.parent / ".cache"
MODELS = {"qwen2_5_vl": "reader-qwen2.5-vl", "llava_next": "reader-llava-next"}
# The longest answer of scripts/common/tasks has some 150 tokens.
MAX_TOKENS = 200
BLOCKS = "▏▎▍▌▋▊▉█"  # from an eighth of a character to a whole one


class DemoError(RuntimeError):
    """The demo cannot go on, or did not show what it should; the message is a sentence for the
    user."""


@dataclass(frozen=True)
class Turn:
    is_right: bool
    visual_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Memory:
    """Bytes that a chat holds in the cache, and what its tokens would take at full width."""

    name: str
    full_bytes: float
    held_bytes: float

    @classmethod
    def between(cls, name: str, before: dict, after: dict) -> "Memory":
        """Of the chat between two states of the server: whole slabs, so that bases and empty rows
        count, too."""
        tokens, slabs = (
            number(after) - number(before)
            for number in (
                lambda state: state["text_slots_used"] + state["visual_slots_used"],
                lambda state: state["slabs_total"] - state["slabs_free"],
            )
        )
        pool = after["kv_pool_bytes"]
        return cls(name, tokens * pool / after["stock_tokens"], slabs * pool / after["slabs_total"])


def rotatek_state(base_url: str) -> dict:
    try:
        info = requests.get(f"{base_url}/server_info", timeout=30).json()
    except requests.RequestException as error:
        raise DemoError(f"/server_info did not answer: {error}") from error
    state = info["internal_states"][0].get("rotatek")
    if state is None:
        raise DemoError(
            "/server_info has no `rotatek` entry: the server runs without the RotateK plugin"
        )
    return state


def hold_chat(base_url: str, picture: Picture) -> list[Turn]:
    """Ask the questions about `picture` in one chat and print each turn. The visual tokens of a
    turn are those that it added to the narrow ones."""
    client = OpenAI(base_url=f"{base_url}/v1", api_key="none", timeout=300, max_retries=0)
    messages: list[dict] = []
    turns = []
    compressed_tokens = rotatek_state(base_url)["tokens_compressed"]
    print(f"{'turn':>4} {'prompt':>7} {'visual':>7} {'cached':>7}")
    for number, question in enumerate(picture.questions, 1):
        content: list[dict] = [{"type": "text", "text": question.text}]
        if number == 1:
            content.insert(0, {"type": "image_url", "image_url": {"url": data_url(picture.image)}})
        messages.append({"role": "user", "content": content})
        try:
            reply = client.chat.completions.create(
                model="default",
                messages=messages,
                max_tokens=MAX_TOKENS,
                temperature=0,
                extra_headers=routing_headers(f"{picture.family} {picture.seed}"),
            )
        except OpenAIError as error:
            raise DemoError(f"no answer from {base_url}: {error}") from error
        answer = reply.choices[0].message.content or ""
        messages.append({"role": "assistant", "content": answer})

        before, compressed_tokens = compressed_tokens, rotatek_state(base_url)["tokens_compressed"]
        details = reply.usage.prompt_tokens_details
        cached_tokens = (details and details.cached_tokens) or 0
        turn = Turn(answer.strip() == question.answer, compressed_tokens - before, cached_tokens)
        turns.append(turn)
        print(
            f"{number:>4} {reply.usage.prompt_tokens:>7} {turn.visual_tokens:>7} "
            f"{turn.cached_tokens:>7}  question: {question.text}\n"
            f"{'right' if turn.is_right else 'WRONG':>27}    answer: {answer.strip()!r}\n"
            f"{'':>27}     truth: {question.answer!r}",
            flush=True,
        )
    return turns


def print_memory(state: dict) -> None:
    # SGLang warms a server up with an image of its own, which counts too.
    print("since the server started, its warm-up included:")
    print(
        f"{state['text_slots_used']} text tokens and {state['visual_slots_used']} image tokens in "
        f"{state['slabs_total'] - state['slabs_free']} of {state['slabs_total']} slabs, with "
        f"{state['bases_used']} bases"
    )
    rank, key_bits, value_bits = state["rank"], state["key_bits"], state["value_bits"]
    keys = f"rank {rank}" if key_bits == 16 else f"Keys of {rank} components and {key_bits} bits"
    print(
        f"{state['segments_compressed']} image segments compressed to {keys}, Values of "
        f"{value_bits} bits in {1000 * state['compress_seconds']:.1f} ms; left at full width: "
        f"{state['segments_full_width'] or 'none'}"
    )
    print(
        f"capacity: {state['kv_pool_bytes'] / 2**20:.1f} MiB hold {state['text_slots_total']} text "
        f"tokens, or up to {state['visual_slots_total']} image tokens beside less text; stock "
        f"SGLang holds {state['stock_tokens']} of any kind"
    )
    full_bytes = state["visual_slots_used"] * state["kv_pool_bytes"] // state["stock_tokens"]
    narrow_bytes = state["visual_slots_used"] * state["visual_row_bytes"]
    print(
        f"resident visual tokens: {full_bytes / 1024:.1f} KiB at full width, "
        f"{narrow_bytes / 1024:.1f} KiB narrow ({full_bytes / max(narrow_bytes, 1):.2f} times as "
        "many fit, before the bases)"
    )


def memory_bars(memories: list[Memory], blocks: str = BLOCKS, columns: int = 40) -> str:
    """Two bars a chat, the longest of ``columns`` characters. ``blocks``: a part of a character
    each, up to the whole one."""
    longest = max(1, *(max(one.full_bytes, one.held_bytes) for one in memories))
    width = max(len(one.name) for one in memories)

    def bar(amount: float) -> str:
        whole, part = divmod(round(len(blocks) * columns * amount / longest), len(blocks))
        text = blocks[-1] * whole + (blocks[part - 1] if part else "")
        return f"{text:<{columns}} {amount / 1024:8.1f} KiB"

    lines = ["memory of each chat, image and text:"]
    for one in memories:
        times = (
            f", {one.full_bytes / one.held_bytes:.2f} times as many fit"
            if one.held_bytes > 0
            else ""
        )
        lines += [
            f"{one.name:<{width}}  full width {bar(one.full_bytes)}",
            f"{'':<{width}}  RotateK    {bar(one.held_bytes)}{times}",
        ]
    return "\n".join(lines)


def blocks_of(encoding: str | None) -> str:
    """What a terminal of this encoding can show."""
    try:
        BLOCKS.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "#"
    return BLOCKS


def score(chats: list[list[Turn]]) -> tuple[int, int]:
    """How many answers were right, of how many."""
    turns = [turn for chat in chats for turn in chat]
    return sum(turn.is_right for turn in turns), len(turns)


def check(chats: list[list[Turn]], state: dict) -> None:
    """DemoError unless the chats showed compressed images that the next turn reuses, and mostly
    right answers."""
    for turns in chats:
        visual_tokens = turns[0].visual_tokens
        if visual_tokens <= 0:
            raise DemoError(
                "no image was compressed; left at full width: "
                f"{state['segments_full_width'] or 'none'}"
            )
        if turns[1].cached_tokens < visual_tokens:
            raise DemoError(
                f"turn 2 found {turns[1].cached_tokens} tokens cached, "
                f"fewer than the {visual_tokens} visual tokens of turn 1"
            )
    if state["visual_slots_used"] <= 0:
        raise DemoError(
            "no visual slot is in use after the chats: the images did not stay in the cache"
        )
    right, asked = score(chats)
    if right <= asked / 2:
        raise DemoError(f"{right} of {asked} answers were right, expected most of them")


def run_backbone(backbone: str, arguments: argparse.Namespace, server_flags: list[str]) -> None:
    print(f"\n== {backbone}", flush=True)
    flags = ["--enable-rotatek", *server_flags]
    log_path = CACHE / "logs" / f"demo-{backbone}.log"
    print(f"starting a server with {' '.join(flags)} (log: {log_path})", flush=True)
    server = ServerProcess(
        SCRIPTS / "models" / MODELS[backbone],
        arguments.port or free_port(),
        flags,
        log_path,
        timeout_seconds=arguments.start_timeout,
    )
    with server:
        try:
            chats, memories = [], []
            for family in FAMILIES:
                picture = make_picture(family, HELD_OUT_SEED + arguments.seed)
                path = CACHE / "demo" / f"{family}-{arguments.seed}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.image.save(path)
                print(
                    f"\n{family}: {path} ({picture.image.width} x {picture.image.height} px)",
                    flush=True,
                )
                before = rotatek_state(server.url)
                chats.append(hold_chat(server.url, picture))
                memories.append(Memory.between(family, before, rotatek_state(server.url)))
            state = rotatek_state(server.url)
            print()
            print_memory(state)
            check(chats, state)
            print(f"\n{memory_bars(memories, blocks_of(sys.stdout.encoding))}\n")
        except DemoError as error:
            raise DemoError(f"{error}\nthe end of {log_path}:\n{server.log_tail(15)}") from error
    right, asked = score(chats)
    print(
        f"ok: {right} of {asked} answers right; every turn 2 reused the visual tokens of turn 1 in "
        "their narrow form"
    )


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Ours, and the flags that are left for the server."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--backbone",
        choices=sorted(MODELS),
        action="append",
        help="(default: every one; may be repeated)",
    )
    add(
        "--seed",
        type=int,
        default=secrets.randbelow(10**6),
        help="of the pictures (default: a new one each time)",
    )
    add("--port", type=int, help="(default: a free one)")
    add(
        "--start-timeout",
        type=float,
        default=300,
        help="seconds for a server to start (default %(default)s)",
    )
    return parser.parse_known_args()


def main() -> None:
    arguments, server_flags = parse_arguments()
    # Turned into an exception, so that a terminated demo still kills its server on the way out.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    failed = []
    for backbone in arguments.backbone or MODELS:
        try:
            run_backbone(backbone, arguments, server_flags)
        except (DemoError, ServerError) as error:
            print(f"error: {backbone}: {error}", file=sys.stderr, flush=True)
            failed.append(backbone)
    if failed:
        sys.exit(f"error: the demo failed for {', '.join(failed)}")


if __name__ == "__main__":
    main()
