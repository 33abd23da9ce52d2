"""A three-turn image chat with a real RotateK server, for each backbone; what was cached and what was saved.

    scripts/demo.sh                           tiny random-weight models, made on the fly: answers are word salad
    scripts/demo.sh --backbone qwen2_5_vl     one backbone

Exit code 0 only if, for every backbone, turn 2 took the image of turn 1 from the cache and the image's
Keys were stored narrow in the visual pool.
"""

import argparse
import json
import signal
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from make_tiny_model import DEFAULT_NAMES, make_model
from pictures import data_url, picture
from server_process import ServerError, ServerProcess, free_port

CACHE = Path(__file__).resolve().parent.parent / ".cache"
IMAGE_SIZE = (448, 336)
QUESTIONS = (
    "What is in this picture?",
    "Which colour is the largest shape?",
    "Here is a second picture. What has changed?",
)
# The turns that bring a picture, and its seed.
PICTURE_SEEDS = {1: 1, 3: 2}


class DemoError(RuntimeError):
    """The demo cannot go on, or did not show what it should; the message is a sentence for the user."""


@dataclass(frozen=True)
class Turn:
    answer: str
    prompt_tokens: int
    visual_tokens: int
    cached_tokens: int


def fetch(url: str, body: dict | None = None) -> dict:
    """GET `url`, or POST `body` to it; the JSON answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise DemoError(f"{url} answered HTTP {error.code}: {error.read().decode(errors='replace')[:500]}") from error
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        raise DemoError(f"{url} did not answer: {error}") from error


def rotatek_state(base_url: str) -> dict:
    state = fetch(base_url + "/server_info")["internal_states"][0].get("rotatek")
    if state is None:
        raise DemoError("/server_info has no `rotatek` entry: the server runs without the RotateK plugin")
    return state


def user_message(turn: int) -> dict:
    content: list[dict] = [{"type": "text", "text": QUESTIONS[turn - 1]}]
    if turn in PICTURE_SEEDS:
        url = data_url(picture(PICTURE_SEEDS[turn], IMAGE_SIZE))
        # SGLang's LLaVA needs "multi-images" once there are two. It changes how an image is cut into tokens,
        # so it is sent from turn 1 on: the prefix of turn 3 stays that of turn 1.
        content.insert(0, {"type": "image_url", "image_url": {"url": url}, "modalities": "multi-images"})
    return {"role": "user", "content": content}


def hold_chat(base_url: str, max_tokens: int) -> list[Turn]:
    """Chat and print each turn. The visual tokens of a turn are those that it added to the visual pool."""
    messages: list[dict] = [{"role": "system", "content": "You are a helpful assistant."}]
    turns = []
    compressed_tokens = rotatek_state(base_url)["tokens_compressed"]
    print(f"{'turn':>4} {'prompt':>7} {'visual':>7} {'cached':>7}  answer")
    for number in range(1, len(QUESTIONS) + 1):
        messages.append(user_message(number))
        body = {"model": "default", "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        reply = fetch(base_url + "/v1/chat/completions", body)
        answer = reply["choices"][0]["message"]["content"]
        messages.append({"role": "assistant", "content": answer})

        before, compressed_tokens = compressed_tokens, rotatek_state(base_url)["tokens_compressed"]
        usage = reply["usage"]
        cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        turn = Turn(answer, usage["prompt_tokens"], compressed_tokens - before, cached_tokens)
        turns.append(turn)
        print(
            f"{number:>4} {turn.prompt_tokens:>7} {turn.visual_tokens:>7} {turn.cached_tokens:>7}  {answer.strip()}",
            flush=True,
        )
    return turns


def print_pools(state: dict, keep_ratio: float) -> None:
    def use(pool: str) -> str:
        return f"{state[f'{pool}_used']} of {state[f'{pool}_total']}"

    # SGLang warms a server up with an image of its own, which counts too.
    print("since the server started, its warm-up included:")
    print(f"text slots {use('text_slots')} · visual slots {use('visual_slots')} · bases {use('bases')}")
    print(
        f"{state['segments_compressed']} image segments compressed to rank {state['rank']} ({state['basis']}) in "
        f"{1000 * state['compress_seconds']:.1f} ms; left at full width: {state['segments_full_width'] or 'none'}"
    )
    capacity_tokens = state["text_slots_total"] + state["visual_slots_total"]
    print(
        f"capacity: {capacity_tokens} tokens in {state['kv_pool_bytes'] / 2**20:.1f} MiB; stock SGLang holds "
        f"{state['stock_tokens']} in the same bytes ({capacity_tokens / state['stock_tokens']:.2f}x)"
    )
    # K and V rows are equally wide in stock; RotateK narrows K alone.
    stock_row_bytes = state["kv_pool_bytes"] / state["stock_tokens"]
    full_bytes = state["visual_slots_used"] * stock_row_bytes
    narrow_bytes = full_bytes * (1 + keep_ratio) / 2
    print(
        f"resident visual tokens: {full_bytes / 1024:.1f} KiB at full width, {narrow_bytes / 1024:.1f} KiB narrow "
        f"({full_bytes - narrow_bytes:.0f} bytes saved, before the bases)"
    )


def check(turns: list[Turn], state: dict) -> None:
    """DemoError unless the chat showed compressed images that the next turn reuses."""
    visual_tokens = turns[0].visual_tokens
    if state["segments_compressed"] <= 0 or visual_tokens <= 0:
        raise DemoError(f"no image was compressed; left at full width: {state['segments_full_width'] or 'none'}")
    if state["visual_slots_used"] <= 0:
        raise DemoError("no visual slot is in use after the chat: the image did not stay in the cache")
    if turns[1].cached_tokens < visual_tokens:
        raise DemoError(
            f"turn 2 found {turns[1].cached_tokens} tokens cached, "
            f"fewer than the {visual_tokens} visual tokens of turn 1"
        )


def run_backbone(backbone: str, arguments: argparse.Namespace) -> None:
    print(f"\n== {backbone}", flush=True)
    model = make_model(arguments.models_dir / DEFAULT_NAMES[backbone], backbone)
    flags = ["--enable-rotatek", "--rotatek-keep-ratio", str(arguments.keep_ratio), "--rotatek-basis", arguments.basis]
    log_path = CACHE / "logs" / f"demo-{backbone}.log"
    print(f"starting a server with {' '.join(flags)} (log: {log_path})", flush=True)
    server = ServerProcess(
        model, arguments.port or free_port(), flags, log_path, timeout_seconds=arguments.start_timeout
    )
    with server:
        try:
            turns = hold_chat(server.url, arguments.max_tokens)
            state = rotatek_state(server.url)
            print_pools(state, arguments.keep_ratio)
            check(turns, state)
        except DemoError as error:
            raise DemoError(f"{error}\nthe end of {log_path}:\n{server.log_tail(15)}") from error
    print(f"ok: turn 2 reused the {turns[0].visual_tokens} visual tokens of turn 1 from the narrow pool", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backbone", choices=sorted(DEFAULT_NAMES), action="append", help="(default: every one; may be repeated)")
    add("--models-dir", type=Path, default=CACHE / "models", help="where the tiny models go (default .cache/models)")
    add("--keep-ratio", type=float, default=0.25, help="share of Key channels kept (default %(default)s)")
    add("--basis", default="pca", help="pca, paper or think (default %(default)s)")
    add("--max-tokens", type=int, default=12, help="of one answer (default %(default)s)")
    add("--port", type=int, help="(default: a free one)")
    add("--start-timeout", type=float, default=300, help="seconds for a server to start (default %(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    # Turned into an exception, so that a terminated demo still kills its server on the way out.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    failed = []
    for backbone in arguments.backbone or DEFAULT_NAMES:
        try:
            run_backbone(backbone, arguments)
        except (DemoError, ServerError) as error:
            print(f"error: {backbone}: {error}", file=sys.stderr, flush=True)
            failed.append(backbone)
    if failed:
        sys.exit(f"error: the demo failed for {', '.join(failed)}")


if __name__ == "__main__":
    main()
