"""The scenarios of bench_server.py, whose --help says what they are, on one running server."""

import argparse
import asyncio
import json
import math
import random
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

import aiohttp
from bench_multiturn import ChatClient, TurnRecord
from bench_records import (
    decode_rate,
    is_kept,
    logged_decode_rate,
    prefill_counters,
    prefill_seconds,
    round_metrics,
    stock_capacity,
)
from pictures import data_url, flat_picture
from server_process import ServerError, ServerProcess
from tqdm import tqdm

TIER = "-hicache"  # --enable-hierarchical-cache
# Chats that the device holds, against stock's in bf16 (capacity.py).
DEVICE_CHATS = {"stock": 1.0, "stock-fp8": 2.0, "rotatek": 2.93, "rotatek-fp8": 3.2}
# Words that are one token each, in real vocabularies as well.
WORDS = (
    "red green blue white black small large round square left right top bottom near above below"
).split()
TTFT_CHATS = {1: 24, 8: 48}  # by concurrency
TIER_CHATS = {1: 12, 8: 16}  # that return from each place, by concurrency
RESUME_SECONDS = 0.2  # until the streams flow again after a pause
PAUSE_SECONDS = 20  # at most


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
                columns["prefill_s"] = prefill_seconds(counters[first], counters[last])
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
    count = max(count, sum(TIER_CHATS.values()) + max(TIER_CHATS.values()))
    await bench.empty_cache()
    chats = bench.chats("tier", range(count))
    await bench.take_turns("tier, turn 1", chats, arguments.concurrency, arguments.answer_tokens)
    rows = []
    for place, concurrency, some in tier_rounds(chats):
        if place == "computed":
            await bench.empty_cache()
        before = prefill_counters(await bench.get("/metrics"))
        taken = await bench.take_turns(
            f"tier, {place}, concurrency {concurrency}", some, concurrency, arguments.answer_tokens
        )
        after = prefill_counters(await bench.get("/metrics"))
        columns = round_metrics(taken.records, taken.seconds)
        columns["prefill_s"] = prefill_seconds(before, after)
        columns["kept_chats"] = sum(chat.was_kept() for chat in some)
        rows.append(bench.row("tier", count, concurrency, place, **columns))
    return rows


def tier_rounds(chats: list) -> list[tuple[str, int, list]]:
    """(place, concurrency, chats) in order. Those that left the device are the oldest, each read
    once from the host; those on it are the newest, and are never among them."""
    rounds, first = [], 0
    for concurrency, some in TIER_CHATS.items():
        gone = chats[first : first + some]
        rounds += [("host", concurrency, gone), ("device", concurrency, chats[-some:])]
        first += some
    return rounds + [("computed", concurrency, gone) for _, concurrency, gone in rounds[::2]]


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
