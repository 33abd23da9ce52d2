"""Multi-turn image chats against any OpenAI-compatible server: latency, throughput and cached
tokens.

    python scripts/bench/bench_multiturn.py --clients 16 --turns 4 --images-per-session 2 --output
    result.jsonl

Each client holds one session of --turns turns. Image i of a session arrives in turn i (the surplus
in the last turn). A session's images are its own, or, with probability --shared-image-fraction, a
set that all such sessions have in common. Prompts and pictures follow from --seed.

Writes one JSON line per turn and prints a table. Nothing is retried; after a failed turn a session
sends no more, its later turns count as errors, and the exit code is 1.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
import numpy as np
from tabulate import tabulate
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

from pictures import data_url, picture
from routing import routing_headers

SYSTEM_PROMPT = (
    "You are a helpful assistant. Answer questions about the pictures that you are shown."
)
QUESTIONS = (
    "What is in this picture?",
    "Which colour is the largest shape?",
    "Read out the words that you can see.",
    "How many shapes are near the left border?",
    "Describe the image in one sentence.",
    "What is below the first word?",
)
NOT_SENT = "not sent: an earlier turn of the session failed"


@dataclass
class TurnRecord:
    """One line of the output file. Times in seconds; None where the server did not report a value,
    or where there is none: an empty answer has no time to its first token."""

    session: int
    turn: int
    ttft_s: float | None = None
    tpot_s: float | None = None
    latency_s: float | None = None
    start_s: float | None = None  # on this process's monotonic clock
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    text: str = ""
    error: str | None = None
    # (since start_s, tokens so far), with --token-times.
    token_times: list[tuple[float, int]] | None = None


@dataclass(frozen=True)
class Session:
    """What one client will say: the content parts of the user message of each turn."""

    number: int
    arrival_seconds: float
    user_messages: list[list[dict]]


def parse_size(text: str) -> tuple[int, int]:
    width, separator, height = text.lower().partition("x")
    if not (
        separator
        and width.isdigit()
        and height.isdigit()
        and int(width) >= 28
        and int(height) >= 28
    ):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not WIDTHxHEIGHT in pixels, each at least 28, e.g. 448x336"
        )
    return int(width), int(height)


def bounded(kind: type, low: float, high: float = float("inf")):
    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__
    return parse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--base-url",
        default="http://127.0.0.1:30000",
        help="server, with or without /v1 (default %(default)s)",
    )
    add("--model", help="model name to send (default: the first one that the server lists)")
    add("--clients", type=bounded(int, 1), default=8, help="sessions (default %(default)s)")
    add(
        "--turns",
        type=bounded(int, 1),
        default=3,
        help="turns of each session (default %(default)s)",
    )
    add("--images-per-session", type=bounded(int, 0), default=1, help="(default %(default)s)")
    add(
        "--shared-image-fraction",
        type=bounded(float, 0, 1),
        default=0.0,
        help="(default %(default)s)",
    )
    add(
        "--image-size",
        type=parse_size,
        default=(448, 448),
        metavar="WxH",
        help="pixels (default 448x448)",
    )
    add("--request-rate", type=bounded(float, 1e-9), default=float("inf"),
        help="session arrivals per second, Poisson (default: all at once)")  # fmt: skip
    add(
        "--concurrency",
        type=bounded(int, 1),
        help="most requests in flight; waiting for a place is not timed",
    )
    add(
        "--max-tokens",
        type=bounded(int, 1),
        default=64,
        help="answer length limit (default %(default)s)",
    )
    add(
        "--ignore-eos",
        action="store_true",
        help="always generate --max-tokens tokens (an SGLang and vLLM extension)",
    )
    add(
        "--token-times",
        action="store_true",
        help="record when tokens arrive (an SGLang and vLLM extension)",
    )
    add("--seed", type=int, default=0, help="(default %(default)s)")
    add(
        "--timeout",
        type=bounded(float, 1),
        default=600.0,
        help="seconds for one request (default %(default)s)",
    )
    add(
        "--output",
        type=Path,
        metavar="FILE.jsonl",
        help="where the records go (default: only the table)",
    )
    arguments = parser.parse_args()
    arguments.base_url = arguments.base_url.rstrip("/").removesuffix("/v1")
    return arguments


def make_sessions(arguments: argparse.Namespace) -> list[Session]:
    draws = random.Random(arguments.seed)
    sessions, arrival = [], 0.0
    for number in tqdm(range(arguments.clients), desc="draw pictures", unit="session", leave=False):
        is_shared = draws.random() < arguments.shared_image_fraction
        owner = "shared" if is_shared else f"session {number}"
        images = [
            image_part(f"{arguments.seed} {owner} {i}", arguments)
            for i in range(arguments.images_per_session)
        ]
        # Session numbers keep the questions of two sessions apart, so that only pictures are
        # shared.
        questions = [
            f"{draws.choice(QUESTIONS)} (session {number}, turn {t + 1})"
            for t in range(arguments.turns)
        ]
        messages = [[{"type": "text", "text": question}] for question in questions]
        for i, image in enumerate(images):
            turn = min(i, arguments.turns - 1)
            messages[turn].insert(len(messages[turn]) - 1, image)
        sessions.append(Session(number, arrival, messages))
        if arguments.request_rate != float("inf"):
            arrival += draws.expovariate(arguments.request_rate)
    return sessions


def image_part(seed: str, arguments: argparse.Namespace) -> dict:
    part = {
        "type": "image_url",
        "image_url": {"url": data_url(picture(seed, arguments.image_size))},
    }
    if arguments.images_per_session > 1:
        # SGLang's LLaVA drops all but one image without it. Sent from turn 1 on: it changes how an
        # image is cut into tokens, and with it the prefix.
        part["modalities"] = "multi-images"
    return part


class ChatClient:
    """Streams chat completions and times them; holds the connection and the --concurrency limit."""

    def __init__(
        self, http: aiohttp.ClientSession, arguments: argparse.Namespace, model: str
    ) -> None:
        self._http = http
        self._url = arguments.base_url + "/v1/chat/completions"
        self._places = asyncio.Semaphore(arguments.concurrency or arguments.clients)
        self._body = {
            "model": model,
            "max_tokens": arguments.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if arguments.ignore_eos:
            self._body["ignore_eos"] = True
        self._token_times = arguments.token_times
        if arguments.token_times:
            # A chunk can hold several tokens; with this it says how many there are so far.
            self._body["stream_options"]["continuous_usage_stats"] = True

    async def complete(self, messages: list[dict], record: TurnRecord) -> None:
        """Send `messages` and fill in `record`, errors included."""
        # Encoded before the clock starts: a megabyte of base64 is the client's time, not the
        # server's.
        body = json.dumps(self._body | {"messages": messages}).encode()
        async with self._places:
            try:
                await self._stream(body, record)
            except (TimeoutError, aiohttp.ClientError, ValueError) as error:
                record.error = f"{type(error).__name__}: {error}"

    async def _stream(self, body: bytes, record: TurnRecord) -> None:
        record.start_s = start = time.perf_counter()
        if self._token_times:
            record.token_times = []
        headers = {"Content-Type": "application/json"} | routing_headers(
            f"session {record.session}"
        )
        finished = False
        async with self._http.post(self._url, data=body, headers=headers) as response:
            if response.status != 200:
                record.error = f"HTTP {response.status}: {(await response.text())[:500]}"
                return
            async for line in response.content:
                data = line.decode().strip().removeprefix("data:").strip()
                if data == "[DONE]":
                    finished = True
                    break
                if data.startswith("{"):
                    self._read_chunk(json.loads(data), time.perf_counter() - start, record)
        record.latency_s = time.perf_counter() - start
        if not finished and record.error is None:
            record.error = "the stream ended before [DONE]"
        elif record.ttft_s is not None and (record.completion_tokens or 0) > 1:
            record.tpot_s = (record.latency_s - record.ttft_s) / (record.completion_tokens - 1)

    @staticmethod
    def _read_chunk(chunk: dict, elapsed_seconds: float, record: TurnRecord) -> None:
        if "error" in chunk:
            record.error = f"in the stream: {json.dumps(chunk['error'])[:500]}"
        if usage := chunk.get("usage"):
            record.prompt_tokens = usage.get("prompt_tokens")
            record.completion_tokens = usage.get("completion_tokens")
            record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        for choice in chunk.get("choices") or []:
            delta = choice.get("delta") or {}
            text = delta.get("content") or ""
            if record.ttft_s is None and (text or delta.get("reasoning_content")):
                record.ttft_s = elapsed_seconds
            if text and record.token_times is not None and record.completion_tokens:
                record.token_times.append((elapsed_seconds, record.completion_tokens))
            record.text += text


async def run_session(client: ChatClient, session: Session, progress: tqdm) -> list[TurnRecord]:
    await asyncio.sleep(session.arrival_seconds)
    messages: list[dict] = [{"role": "system", "content": SYSTEM_PROMPT}]
    records: list[TurnRecord] = []
    for turn, content in enumerate(session.user_messages, start=1):
        record = TurnRecord(session.number, turn)
        if records and records[-1].error:
            record.error = NOT_SENT
        else:
            messages.append({"role": "user", "content": content})
            await client.complete(messages, record)
            messages.append({"role": "assistant", "content": record.text})
        records.append(record)
        progress.update()
    return records


async def find_model(http: aiohttp.ClientSession, base_url: str) -> str:
    """The first model that the server lists; exits with a sentence when there is no such server."""
    url = f"{base_url}/v1/models"
    try:
        async with http.get(url, timeout=aiohttp.ClientTimeout(total=15)) as response:
            if response.status != 200:
                sys.exit(
                    f"error: {url} answered HTTP {response.status}; is this an OpenAI-compatible "
                    "server?"
                )
            return (await response.json())["data"][0]["id"]
    except (TimeoutError, aiohttp.ClientError) as error:
        sys.exit(
            f"error: no server at {base_url} ({error}); start one with scripts/serve.sh, or set "
            "--base-url"
        )
    except (ValueError, KeyError, IndexError, TypeError):
        sys.exit(f"error: {url} lists no model; is this an OpenAI-compatible server?")


async def run(arguments: argparse.Namespace) -> tuple[list[TurnRecord], float]:
    """All sessions; the records by session and turn, and the wall-clock seconds from first to
    last."""
    headers = {}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    timeout = aiohttp.ClientTimeout(total=arguments.timeout)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        timeout=timeout, connector=connector, headers=headers, read_bufsize=2**22
    ) as http:
        listed_model = await find_model(http, arguments.base_url)
        client = ChatClient(http, arguments, arguments.model or listed_model)
        sessions = make_sessions(arguments)
        with tqdm(total=arguments.clients * arguments.turns, desc="chat", unit="turn") as progress:
            start = time.perf_counter()
            by_session = await asyncio.gather(
                *(run_session(client, session, progress) for session in sessions)
            )
            seconds = time.perf_counter() - start
    records = [record for records in by_session for record in records]
    fill_in_zero_cached_tokens(records)
    return records, seconds


def fill_in_zero_cached_tokens(records: list[TurnRecord]) -> None:
    """SGLang leaves cached tokens out of the usage when there are none; a server that never has
    them stays None."""
    if any(record.cached_tokens is not None for record in records):
        for record in records:
            if record.cached_tokens is None and record.error is None:
                record.cached_tokens = 0


def percentile(values: list[float | None], share: float) -> float | None:
    """The quantile at `share` of those values that are not None; None of nothing."""
    known = [value for value in values if value is not None]
    return float(np.quantile(known, share)) if known else None


def milliseconds(records: list[TurnRecord], field: str, share: float) -> str:
    value = percentile([getattr(record, field) for record in records], share)
    return "-" if value is None else f"{1000 * value:.1f}"


def cached_share(records: list[TurnRecord]) -> str:
    """Of the prompt tokens; '-' where the server does not report cached tokens."""
    reported = [r for r in records if r.cached_tokens is not None and r.prompt_tokens]
    if not reported:
        return "-"
    return f"{sum(r.cached_tokens for r in reported) / sum(r.prompt_tokens for r in reported):.1%}"


def table_row(name: str, records: list[TurnRecord], seconds: float) -> list[str]:
    done = [r for r in records if r.error is None]
    latencies = [
        milliseconds(done, field, p)
        for field in ("ttft_s", "tpot_s", "latency_s")
        for p in (0.5, 0.99)
    ]
    prompt_tokens, completion_tokens = (
        sum(getattr(r, field) or 0 for r in done)
        for field in ("prompt_tokens", "completion_tokens")
    )
    rates = [
        f"{completion_tokens / seconds:.1f}",
        f"{prompt_tokens / seconds:.0f}",
        f"{len(done) / seconds:.2f}",
    ]
    return [
        name,
        *latencies,
        *rates,
        cached_share(done),
        f"{len(records) - len(done)}/{len(records)}",
    ]


def print_summary(records: list[TurnRecord], seconds: float) -> None:
    header = ["turn", "TTFT p50", "p99", "TPOT p50", "p99", "latency p50", "p99",
              "out tok/s", "in tok/s", "req/s", "cached", "errors"]  # fmt: skip
    rows = [
        table_row(str(turn), [r for r in records if r.turn == turn], seconds)
        for turn in sorted({record.turn for record in records})
    ]
    rows.append(table_row("total", records, seconds))
    print(tabulate(rows, header, "plain", disable_numparse=True, stralign="right"))
    print(
        f"times in ms; rates over the whole run of {seconds:.2f} s; cached = share of the prompt "
        "tokens"
    )


def main() -> None:
    arguments = parse_arguments()
    if arguments.output:
        # Before the run: a path that cannot be written should not cost one.
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.touch()
    records, seconds = asyncio.run(run(arguments))
    if arguments.output:
        arguments.output.write_text(
            "".join(json.dumps(asdict(record)) + "\n" for record in records)
        )
    print_summary(records, seconds)
    failed = [record for record in records if record.error]
    if failed:
        first = next(record for record in failed if record.error != NOT_SENT)
        sys.exit(
            f"error: {len(failed)} of {len(records)} requests failed; "
            f"the first: session {first.session}, turn {first.turn}: {first.error}"
        )


if __name__ == "__main__":
    main()
