"""Stock SGLang against RotateK, one server after another on this machine, with equal KV bytes and
equal flags.

    python scripts/models/make_full_size_config.py OUT/llava-next-8b --model llava-next-8b
    python scripts/bench/bench_server.py OUT/llava-next-8b --max-total-tokens 450000
    python scripts/bench/bench_server.py OUT/llava-next-8b --max-total-tokens 450000 \\
        --servers rotatek --scenarios decode
    python scripts/bench/bench_server.py --plot    # server.csv -> server.png, server-population.png

Each chat has one picture of its own in turn 1; every turn adds a question of --question-words
words, and the answer comes back in the next turn. Scenarios:

- ttft: --turns turns of a few chats, at concurrency 1 and 8. Turn 1 holds the image processor's
  time on the CPU; the column prefill_s has the server's own prefill stage (vision tower, language
  model, compression; mean of its /metrics).
- decode: for each of --chats, turn 1, then turn 2 of all chats at once. The rate counts while all
  chats decode. The image processor runs in turn 2 as well, so the server is paused until all
  requests had time to reach its queue.
- capacity: 1.4 times as many chats as stock can hold do turn 1, then all return in the same order
  for turn 2, the worst case of an LRU cache. Then new chats come until they are 1.8 times as many,
  and all return newest first: those whose whole prompt is still cached are the largest population
  that is kept (turn "kept"; equal to `chats` if all were).
- population: for each of --multiples times as many chats as stock can hold in bf16, all do turn 1,
  then as many turns come from the same chats: in the same order (turn "order"), or by a Zipf law
  (turn "zipf"), where a few chats talk most.
- tier, of servers with the host's memory tier (--host-gb): the next turn of a few chats, at
  concurrency 1 and 8, that left the device and are on the host (turn "host"), of others that are on
  the device ("device"), and of the first ones again when nothing is cached ("computed").

Rows are appended to --output after each scenario.
"""

import argparse
import asyncio
import json
import math
import os
import random
import shlex
import sys
import tempfile
import time
import tomllib
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import entry_points
from pathlib import Path

import aiohttp
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

from bench_multiturn import ChatClient, TurnRecord, parse_size
from bench_records import (
    append_rows,
    decode_rate,
    is_kept,
    logged_decode_rate,
    machine_lines,
    plot,
    prefill_counters,
    round_metrics,
    rows_with_populations,
    stock_capacity,
)
from pictures import data_url, flat_picture
from server_process import ServerError, ServerProcess, free_port

ROOT = Path(__file__).resolve().parents[2]
FP8 = ["--kv-cache-dtype", "fp8_e4m3"]
ROTATEK = ["--enable-rotatek"]
TIER = "-hicache"  # --enable-hierarchical-cache
SERVERS = {
    "stock": [],
    "stock-flashinfer": ["--attention-backend", "flashinfer"],
    "stock-fp8": FP8,
    "rotatek": ROTATEK,
    "rotatek-fp8": [*ROTATEK, *FP8],  # of text
    "rotatek-paper": [*ROTATEK, "--rotatek-key-bits", "16"],
    "rotatek-keep-0.5": [*ROTATEK, "--rotatek-keep-tokens", "0.5"],
    "rotatek-keep-0.35": [*ROTATEK, "--rotatek-keep-tokens", "0.35"],
}
DEFAULT_SERVERS = [name for name in SERVERS if "keep" not in name]
# Chats that the device holds, against stock's in bf16 (capacity.py).
DEVICE_CHATS = {"stock": 1.0, "stock-fp8": 2.0, "rotatek": 2.93, "rotatek-fp8": 3.2}
SERVERS |= {name + TIER: [*SERVERS[name], "--enable-hierarchical-cache"] for name in DEVICE_CHATS}
# Model type -> pixels of a picture of 1225 or 2928 visual tokens.
IMAGE_SIZES = {"qwen2_5_vl": (980, 980), "llava_next": (672, 672)}
# Words that are one token each, in real vocabularies as well.
WORDS = (
    "red green blue white black small large round square left right top bottom near above below"
).split()
WARMUP_CHATS = 8
TTFT_CHATS = {1: 24, 8: 48}  # by concurrency
TIER_CHATS = {1: 12, 8: 16}  # that return from each place, by concurrency
RESUME_SECONDS = 0.2  # until the streams flow again after a pause
PAUSE_SECONDS = 20  # at most
PLUGIN_GROUP = "sglang.srt.plugins"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "model", type=Path, nargs="?", help="checkpoint directory, e.g. of make_full_size_config.py"
    )
    add(
        "--max-total-tokens",
        type=int,
        metavar="N",
        help="KV bytes of every server, in tokens of stock in bf16",
    )
    add(
        "--servers",
        nargs="+",
        choices=SERVERS,
        default=DEFAULT_SERVERS,
        help="(default: %(default)s)",
    )
    scenarios = [name for name in SCENARIOS if name != "tier"]
    add(
        "--scenarios",
        nargs="+",
        choices=SCENARIOS,
        default=scenarios,
        help="(default: all but tier)",
    )
    add(
        "--host-gb",
        type=int,
        default=24,
        help="memory of the host's tier, of servers that have it (default %(default)s)",
    )
    add(
        "--chats",
        type=int,
        nargs="+",
        default=[32, 128],
        help="decode: chats at once (default 32 128)",
    )
    add(
        "--decode-tokens",
        type=int,
        default=256,
        help="decode: tokens of the timed answers (default %(default)s)",
    )
    add(
        "--answer-tokens",
        type=int,
        default=16,
        help="tokens of all other answers (default %(default)s)",
    )
    add(
        "--question-words",
        type=int,
        default=32,
        help="words of each question (default %(default)s)",
    )
    add("--turns", type=int, default=3, help="ttft: turns of a chat (default %(default)s)")
    add(
        "--population",
        type=int,
        help="capacity: returning chats (default: 1.4 times what stock can hold)",
    )
    add(
        "--multiples",
        type=float,
        nargs="+",
        default=[1.0, 1.5, 2.0, 3.0, 4.0],
        help="population (default 1 ... 4)",
    )
    add(
        "--concurrency",
        type=int,
        default=8,
        help="requests in flight where nothing else is said (default %(default)s)",
    )
    add("--image-size", type=parse_size, metavar="WxH", help="pixels (default: by model type)")
    add(
        "--load-format",
        default="dummy",
        help="'dummy' for random weights, 'auto' (default %(default)s)",
    )
    add(
        "--mm-attention-backend",
        default="triton_attn",
        help="vision tower; '' leaves it out (default %(default)s)",
    )
    add("--sampling-backend", default="pytorch", help="'' leaves it out (default %(default)s)")
    add(
        "--stream-interval",
        type=int,
        default=8,
        help="tokens a chunk, so that HTTP is not what is measured",
    )
    add(
        "--server-flags",
        default="",
        help="more flags for all servers, as one string with =: --server-flags='--x 1'",
    )
    add("--rotatek-flags", default="", help="more flags for RotateK alone, as well")
    add("--start-timeout", type=float, default=300, help="seconds (default %(default)s)")
    add("--request-timeout", type=float, default=300, help="seconds (default %(default)s)")
    add(
        "--logs",
        type=Path,
        default=Path(tempfile.gettempdir()) / "bench_server",
        help="(default %(default)s)",
    )
    add(
        "--output",
        type=Path,
        default=ROOT / "scripts" / "results" / "server.csv",
        help="(default %(default)s)",
    )
    add(
        "--plot",
        action="store_true",
        help="also draw the CSV as a PNG beside it; without a model, only that",
    )
    arguments = parser.parse_args()
    if arguments.model and not arguments.max_total_tokens:
        parser.error(
            "--max-total-tokens is needed: equal KV bytes are what makes the servers comparable"
        )
    if not (arguments.model or arguments.plot):
        parser.error("give a model directory, or --plot")
    return arguments


def say(text: str) -> None:
    tqdm.write(f"{datetime.now():%H:%M:%S} {text}")
    sys.stdout.flush()


@dataclass
class Chat:
    """``picture`` comes with the first question. ``records``: one per turn so far."""

    number: int
    picture: str
    messages: list[dict] = field(default_factory=list)
    records: list[TurnRecord] = field(default_factory=list)

    def ask(self, words: int) -> None:
        draws = random.Random(f"{self.number} {len(self.records)}")
        content = [{"type": "text", "text": " ".join(draws.choices(WORDS, k=words))}]
        if not self.records:
            content.insert(0, {"type": "image_url", "image_url": {"url": self.picture}})
        self.messages.append({"role": "user", "content": content})

    def was_kept(self) -> bool:
        """Whether the last turn still found the prompt of the one before in the cache."""
        return is_kept(self.records[-1], self.records[-2])


@dataclass
class Round:
    """One turn of several chats; the seconds run from the first request to the last token."""

    records: list[TurnRecord]
    seconds: float


@dataclass
class Bench:
    """One running server and what is needed to measure it."""

    http: aiohttp.ClientSession
    server: ServerProcess
    arguments: argparse.Namespace
    identity: dict  # the columns that all rows of this server share
    size: tuple[int, int]

    def chats(self, scenario: str, numbers: range) -> list[Chat]:
        """New chats; their pictures differ from those of every other scenario and number."""
        draw = tqdm(numbers, desc="draw pictures", leave=False, disable=None)
        return [
            Chat(i, data_url(flat_picture(f"{scenario} {i}", self.size), compress_level=1))
            for i in draw
        ]

    async def take_turns(
        self,
        label: str,
        chats: list[Chat],
        concurrency: int,
        max_tokens: int,
        token_times: bool = False,
    ) -> Round:
        """The next turn of ``chats``, sent in their order. Raises ServerError when the server is
        gone."""
        settings = Namespace(
            base_url=self.server.url, concurrency=concurrency, max_tokens=max_tokens
        )
        settings.ignore_eos, settings.token_times = True, token_times
        client = ChatClient(self.http, settings, "default")

        async def take(chat: Chat) -> TurnRecord:
            chat.ask(self.arguments.question_words)
            record = TurnRecord(chat.number, len(chat.records) + 1)
            await client.complete(chat.messages, record)
            chat.messages.append({"role": "assistant", "content": record.text})
            chat.records.append(record)
            progress.update()
            return record

        with tqdm(total=len(chats), desc=label, unit="turn", leave=False, disable=None) as progress:
            start = time.perf_counter()
            records = await asyncio.gather(*map(take, chats))
            taken = Round(records, time.perf_counter() - start)
        failed = [record.error for record in records if record.error]
        if not self.server.is_alive() or len(failed) == len(records):
            raise ServerError(
                f"{label}: {failed[:1]}; the end of the log:\n{self.server.log_tail(15)}"
            )
        failures = f", {len(failed)} FAILED: {failed[0]}" if failed else ""
        say(f"{label}: {len(chats)} turns in {taken.seconds:.1f} s{failures}")
        return taken

    async def post(self, path: str, body: dict | None = None) -> None:
        async with self.http.post(self.server.url + path, json=body) as response:
            if response.status != 200:
                raise ServerError(
                    f"{path} answered HTTP {response.status}: {(await response.text())[:300]}"
                )

    async def get(self, path: str) -> str:
        async with self.http.get(self.server.url + path) as response:
            return await response.text()

    async def tokens_pruned(self) -> int:
        state = json.loads(await self.get("/server_info"))["internal_states"][0]
        return state.get("rotatek", {}).get("tokens_pruned", 0)

    async def empty_cache(self) -> None:
        # The server refuses until the last request has left it, a moment after its last token.
        await self.post("/flush_cache?timeout=30")

    def row(self, scenario: str, chats: int, concurrency: int, turn: int | str, **columns) -> dict:
        where = {"scenario": scenario, "chats": chats, "concurrency": concurrency, "turn": turn}
        return self.identity | where | columns


# --- scenarios: each returns its CSV rows ---


async def ttft(bench: Bench) -> list[dict]:
    rows = []
    for concurrency, count in TTFT_CHATS.items():
        await bench.empty_cache()
        chats = bench.chats(f"ttft {concurrency}", range(count))
        metrics = await bench.get("/metrics")
        rounds, counters = [], [prefill_counters(metrics)]
        for turn in range(1, bench.arguments.turns + 1):
            label = f"ttft, concurrency {concurrency}, turn {turn}"
            rounds.append(
                await bench.take_turns(label, chats, concurrency, bench.arguments.answer_tokens)
            )
            metrics = await bench.get("/metrics")
            counters.append(prefill_counters(metrics))
        # All stages of a request, for whoever looks for the rest of the time.
        bench.server.log_path.with_suffix(f".ttft-{concurrency}.metrics").write_text(metrics)
        for turn, first, last in (("1", 0, 1), ("2+", 1, len(rounds))):
            if last > first:
                records = [record for taken in rounds[first:last] for record in taken.records]
                columns = round_metrics(records, sum(taken.seconds for taken in rounds[first:last]))
                seconds, requests = (
                    b - a for a, b in zip(counters[first], counters[last], strict=True)
                )
                columns["prefill_s"] = seconds / requests if requests else None
                rows.append(bench.row("ttft", count, concurrency, turn, **columns))
    return rows


async def decode(bench: Bench) -> list[dict]:
    rows = []
    for count in bench.arguments.chats:
        await bench.empty_cache()
        chats = bench.chats(f"decode {count}", range(count))
        warm = await bench.take_turns(
            f"decode, {count} chats, turn 1",
            chats,
            bench.arguments.concurrency,
            bench.arguments.answer_tokens,
        )
        log_start = bench.server.log_path.stat().st_size
        turns = asyncio.create_task(
            bench.take_turns(
                f"decode, {count} chats, turn 2", chats, count, bench.arguments.decode_tokens, True
            )
        )
        # A request that comes before the pause is processed up to the queue; a later one waits
        # outside, and comes late.
        await asyncio.sleep(0.5)
        await bench.post("/pause_generation", {"mode": "in_place"})
        # Turn 1 took this long with the image processor and the prefill.
        await asyncio.sleep(min(warm.seconds, PAUSE_SECONDS))
        await bench.post("/continue_generation", {"torch_empty_cache": False})
        # All may have begun before the pause, which must not count.
        resumed = time.perf_counter() + RESUME_SECONDS
        taken = await turns
        rate, window = decode_rate(taken.records, resumed)
        log = bench.server.log_path.read_bytes()[log_start:].decode(errors="replace")
        columns = round_metrics(taken.records, taken.seconds)
        # These hold the pause.
        for name in ("seconds", "turns_per_s", "output_tokens_per_s", "ttft_p50_s", "ttft_p90_s"):
            del columns[name]
        columns |= {
            "decode_tokens_per_s": rate,
            "decode_tokens_per_s_log": logged_decode_rate(log, count),
            "window_s": window,
        }
        rows.append(bench.row("decode", count, count, "2", **columns))
        if rate is None:
            say(
                f"no moment at which all {count} chats decode: give more --decode-tokens or KV "
                "memory"
            )
    return rows


async def chats_of_stock(bench: Bench, scenario: str) -> int:
    """Chats of two turns that stock in bf16 can hold, from the length of one."""
    await bench.empty_cache()
    before = await bench.tokens_pruned()
    pilot = bench.chats(f"{scenario} pilot", range(1))
    for turn in (1, 2):
        await bench.take_turns(
            f"{scenario}, pilot, turn {turn}", pilot, 1, bench.arguments.answer_tokens
        )
    pruned = await bench.tokens_pruned() - before
    return stock_capacity(bench.arguments.max_total_tokens, pilot[0].records[-1], pruned)


async def capacity(bench: Bench) -> list[dict]:
    arguments = bench.arguments
    stock = await chats_of_stock(bench, "capacity")
    returning = arguments.population or math.ceil(1.4 * stock)
    await bench.empty_cache()
    say(f"capacity: stock can hold {stock} chats of two turns; {returning} come and return")

    rows = []
    chats = bench.chats("capacity", range(returning))
    for turn in (1, 2):
        label = f"capacity, {returning} chats, turn {turn}"
        taken = await bench.take_turns(label, chats, arguments.concurrency, arguments.answer_tokens)
        columns = round_metrics(taken.records, taken.seconds)
        if turn > 1:
            columns["kept_chats"] = sum(chat.was_kept() for chat in chats)
        rows.append(bench.row("capacity", returning, arguments.concurrency, str(turn), **columns))

    more = bench.chats("capacity", range(returning, math.ceil(returning * 1.8 / 1.4)))
    await bench.take_turns(
        "capacity, more chats, turn 1", more, arguments.concurrency, arguments.answer_tokens
    )
    newest_first = [*reversed(more), *reversed(chats)]
    kept, seen, seconds, records = 0, 0, 0.0, []
    while seen < len(newest_first):
        block = newest_first[seen : seen + arguments.concurrency]
        label = f"capacity, newest first from {seen}"
        taken = await bench.take_turns(label, block, arguments.concurrency, arguments.answer_tokens)
        hits = sum(chat.was_kept() for chat in block)
        seen, kept, seconds = seen + len(block), kept + hits, seconds + taken.seconds
        records += taken.records
        if not hits:  # everything older went before these
            break
    columns = round_metrics(records, seconds) | {"kept_chats": kept}
    rows.append(bench.row("capacity", len(newest_first), arguments.concurrency, "kept", **columns))
    say(f"capacity: {kept} of {len(newest_first)} chats kept")
    return rows


async def population(bench: Bench) -> list[dict]:
    arguments = bench.arguments
    stock = await chats_of_stock(bench, "population")
    rows = []
    for multiple in arguments.multiples:
        count = math.ceil(multiple * stock)
        for order in ("order", "zipf"):
            await bench.empty_cache()
            chats = bench.chats(f"population {order}", range(count))
            label = f"population, {multiple:g} times stock, {order}"
            await bench.take_turns(
                f"{label}, turn 1", chats, arguments.concurrency, arguments.answer_tokens
            )
            turns, start, kept = [], time.perf_counter(), 0
            for block in return_blocks(count, arguments.concurrency, order):
                of_block = [chats[number] for number in block]
                taken = await bench.take_turns(
                    label, of_block, arguments.concurrency, arguments.answer_tokens
                )
                turns += taken.records
                kept += sum(chat.was_kept() for chat in of_block)
            columns = round_metrics(turns, time.perf_counter() - start) | {"kept_chats": kept}
            rows.append(bench.row("population", count, arguments.concurrency, order, **columns))
    return rows


async def tier(bench: Bench) -> list[dict]:
    """There are a quarter more chats than the device holds, and the host has room for all."""
    arguments, name = bench.arguments, bench.identity["server"]
    stock = await chats_of_stock(bench, "tier")
    count = math.ceil(1.25 * DEVICE_CHATS[name.removesuffix(TIER)] * stock)
    await bench.empty_cache()
    chats = bench.chats("tier", range(count))
    await bench.take_turns("tier, turn 1", chats, arguments.concurrency, arguments.answer_tokens)
    rounds, first = [], 0
    for concurrency, some in TIER_CHATS.items():
        gone = chats[first : first + some]
        rounds += [("host", concurrency, gone), ("device", concurrency, chats[-some:])]
        first += some
    rounds += [("computed", concurrency, gone) for _, concurrency, gone in rounds[::2]]
    rows = []
    for place, concurrency, some in rounds:
        if place == "computed":
            await bench.empty_cache()
        before = prefill_counters(await bench.get("/metrics"))
        taken = await bench.take_turns(
            f"tier, {place}, concurrency {concurrency}", some, concurrency, arguments.answer_tokens
        )
        after = prefill_counters(await bench.get("/metrics"))
        columns = round_metrics(taken.records, taken.seconds)
        columns["prefill_s"] = (after[0] - before[0]) / max(1, after[1] - before[1])
        columns["kept_chats"] = sum(chat.was_kept() for chat in some)
        rows.append(bench.row("tier", count, concurrency, place, **columns))
    return rows


def return_blocks(count: int, concurrency: int, order: str) -> Iterator[list[int]]:
    """``count`` numbers of chats in blocks of at most ``concurrency``, all different in a block: 0,
    1, 2, ... ("order"), or drawn by a Zipf law of exponent 1 over chats in an order of its own
    ("zipf"), the same always."""
    blocks = [
        range(first, min(first + concurrency, count)) for first in range(0, count, concurrency)
    ]
    draws = random.Random(f"{order} {count}")
    ranks = draws.sample(range(1, count + 1), count)
    for block in blocks:
        if order == "order":
            yield list(block)
        else:
            # The largest of random ** rank are a weighted sample without replacement, of weight
            # 1 / rank.
            keys = [draws.random() ** rank for rank in ranks]
            yield sorted(range(count), key=keys.__getitem__, reverse=True)[: len(block)]


SCENARIOS = {
    "ttft": ttft,
    "decode": decode,
    "capacity": capacity,
    "population": population,
    "tier": tier,
}


def plugin_path(directory: Path) -> list[str]:
    """What a server needs on PYTHONPATH to find the plugin: this repository and, where the package
    is not installed, a minimal distribution that names its entry point, written to
    ``directory``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = project["entry-points"][PLUGIN_GROUP]
    if {entry.name for entry in entry_points(group=PLUGIN_GROUP)} >= set(names):
        return [str(ROOT)]
    info = directory / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(metadata)
    lines = [f"[{PLUGIN_GROUP}]", *(f"{name} = {target}" for name, target in names.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    say(f"{project['name']} is not installed: servers find its entry point through {info}")
    return [str(directory), str(ROOT)]


def server_flags(arguments: argparse.Namespace, server: str, config: dict) -> list[str]:
    top = max([*arguments.chats, *TTFT_CHATS, arguments.concurrency])
    # Powers of two alone: capturing takes most of the start. Batches between are padded, on every
    # server.
    batch_sizes = sorted(
        {2**i for i in range(top.bit_length()) if 2**i <= top} | {*arguments.chats, top}
    )
    flags = ["--load-format", arguments.load_format, "--dtype", "bfloat16", "--enable-metrics"]
    # In FP8 a token takes half the bytes.
    max_tokens = arguments.max_total_tokens * (2 if FP8[1] in SERVERS[server] else 1)
    flags += [
        "--max-total-tokens",
        str(max_tokens),
        "--stream-interval",
        str(arguments.stream_interval),
    ]
    flags += ["--cuda-graph-bs-decode", *map(str, batch_sizes)]
    for flag in ("mm_attention_backend", "sampling_backend"):
        if value := getattr(arguments, flag):
            flags += ["--" + flag.replace("_", "-"), value]
    if config["architectures"] == ["LlavaNextForConditionalGeneration"]:
        # Stock has no native model of this layout; the plugin's, without RotateK, gives it the
        # radix cache.
        flags.append("--native-llava-next")
    flags += SERVERS[server] + shlex.split(arguments.server_flags)
    if server.endswith(TIER):
        flags += ["--hicache-size", str(arguments.host_gb)]
    return flags + (shlex.split(arguments.rotatek_flags) if server.startswith("rotatek") else [])


async def measure(
    arguments: argparse.Namespace, name: str, server: ServerProcess, size: tuple[int, int]
) -> None:
    timeout = aiohttp.ClientTimeout(total=arguments.request_timeout)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        timeout=timeout, connector=connector, read_bufsize=2**22
    ) as http:
        bench = Bench(http, server, arguments, {}, size)
        state = json.loads(await bench.get("/server_info"))["internal_states"][0]
        bench.identity = {
            "model": arguments.model.name,
            "server": name,
            "attention_backend": state["attention_backend"],
            "kv_stock_tokens": arguments.max_total_tokens,
            "kv_gb": state["memory_usage"]["kvcache"],
        }
        log = server.log_path.read_text(errors="replace").splitlines()
        pools = [
            line for line in log if "KV Cache is allocated" in line or "RotateK: memory for" in line
        ]
        comments = [f"{arguments.model.name}, {name}: {line}" for line in pools]
        say(pools[-1] if pools else "the log has no line on pool sizes")

        chats = bench.chats("warm-up", range(WARMUP_CHATS))
        for turn in (1, 2):
            await bench.take_turns(
                f"warm-up, turn {turn}", chats, WARMUP_CHATS, arguments.answer_tokens
            )
        for scenario in arguments.scenarios:
            rows = await SCENARIOS[scenario](bench)
            state = json.loads(await bench.get("/server_info"))["internal_states"][0]
            if rotatek := state.get("rotatek"):
                comments.append(
                    f"{arguments.model.name}, {name}, rotatek after {scenario}: "
                    f"{json.dumps(rotatek)}"
                )
            append_rows(arguments.output, comments, rows)
            comments = []
            for row in rows:
                columns = {
                    name: row[name]
                    for name in row
                    if name not in bench.identity and row[name] is not None
                }
                say(
                    "  "
                    + "  ".join(
                        f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
                        for k, v in columns.items()
                    )
                )


def main() -> None:
    arguments = parse_arguments()
    failed = []
    if arguments.model:
        config = json.loads((arguments.model / "config.json").read_text())
        size = arguments.image_size or IMAGE_SIZES.get(config["model_type"], (672, 672))
        append_rows(arguments.output, machine_lines(), [])
        with tempfile.TemporaryDirectory() as directory:
            path = [*plugin_path(Path(directory)), *filter(None, [os.environ.get("PYTHONPATH")])]
            for name in arguments.servers:
                start = time.monotonic()
                flags = server_flags(arguments, name, config)
                log = arguments.logs / f"{arguments.model.name}-{name}.log"
                say(f"start {name}: {shlex.join(flags)}; log {log}")
                environment = {
                    "PYTHONPATH": os.pathsep.join(path),
                    "ROTATEK_PYTHON": sys.executable,
                }
                server = ServerProcess(
                    arguments.model, free_port(), flags, log, environment, arguments.start_timeout
                )
                try:
                    with server:
                        say(f"{name} is healthy after {time.monotonic() - start:.0f} s")
                        asyncio.run(measure(arguments, name, server, size))
                    say(f"{name} done after {time.monotonic() - start:.0f} s")
                except (ServerError, aiohttp.ClientError, TimeoutError) as error:
                    say(f"{name} FAILED: {error}")
                    append_rows(
                        arguments.output,
                        [f"{arguments.model.name}, {name} FAILED: {str(error)[:300]}"],
                        [],
                    )
                    failed.append(name)
    if arguments.plot:
        plot(rows_with_populations(arguments.output), arguments.output.with_suffix(".png"))
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed; the others are in {arguments.output}")


if __name__ == "__main__":
    main()
