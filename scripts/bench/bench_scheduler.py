"""What the scheduler thread pays for memory, on one CPU core, against the host's own radix cache
and allocator.

    python scripts/bench/bench_scheduler.py [--quick] [--csv scripts/results/scheduler-cpu.csv]

No model and no GPU: the real trees, tables and allocators on the CPU, driven in the scheduler's
order (scheduler_host.py). Times are medians of wall clock in microseconds. Of stock it is the
host's RadixCache and TokenToKVPoolAllocator; what stock has no step for has no ratio. Stock on a
GPU pays for device reads besides, which do not show here; RotateK has none.
"""

from __future__ import annotations

import argparse
import csv
import platform
import random
import statistics
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import without_gpu  # noqa: F401
from scheduler_host import Host, StockHost, WaitingRequest, image
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang.srt.mem_cache.common import checkpoint_kv_cache
from sglang.srt.runtime_context import publish
from sglang.srt.server_args import ServerArgs

from sglang_rotatek.config import RotateKConfig
from sglang_rotatek.memory.admission import RotateKPrefillAdder
from sglang_rotatek.memory.layout import PoolLayout
from sglang_rotatek.memory.placement import prompt_runs
from sglang_rotatek.memory.segments import image_runs

LARGE = 1 << 30
IMAGE_TOKENS, TEXT_TOKENS = 2928, 161
# Of head_dim 128 at rank 32.
TEXT_ROWS, VISUAL_ROWS = 20, 32
FIELDS = ("what", "rotatek", "stock", "ratio", "unit")


def layout_of(num_slabs: int) -> PoolLayout:
    return PoolLayout(num_slabs, int(num_slabs * 0.95), TEXT_ROWS, VISUAL_ROWS)


def median_us(
    step: Callable[[], object], repeats: int, before: Callable[[], object] = lambda: None
) -> float:
    times = []
    for _ in range(repeats):
        before()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def admit(host: StockHost, token_ids: list[int]) -> tuple[WaitingRequest, float]:
    """A request that the adder has let in, and the microseconds that it took."""
    req = WaitingRequest(token_ids, max_new_tokens=100).match(host.tree)
    no_batch = SimpleNamespace(reqs=[], is_empty=lambda: True, batch_size=lambda: 0)
    arguments = (1, host.tree, host.allocator, no_batch, 0.1, LARGE, None)
    is_ours = isinstance(host, Host)
    adder = RotateKPrefillAdder(*arguments, scheduler=None) if is_ours else PrefillAdder(*arguments)
    if is_ours:
        prompt_runs(req)  # found when the request came
    start = time.perf_counter()
    result = adder.add_one_req(req, has_chunked_req=False, truncation_align_size=None)
    seconds = time.perf_counter() - start
    assert result in (AddReqResult.CONTINUE, AddReqResult.OTHER) and adder.can_run_list == [req], (
        result
    )
    host.running.append(req)
    return req, seconds * 1e6


def text_traffic(
    host: StockHost, num_tokens: int, chats: int, turn_overs: float, rng: random.Random
) -> None:
    """``chats`` requests decode side by side, answers of all lengths, until text has filled the
    memory so many times."""
    running, filled, number = [], 0, 0
    while filled < turn_overs * num_tokens:
        while len(running) < chats:
            number += 1
            req = host.start([10_000 + number, *rng.choices(range(1000), k=rng.randint(20, 160))])
            req.stop_after = rng.randint(20, 300)
            running.append(host.prefill_whole(req))
            filled += len(req.origin_input_ids)
        assert host.decode_all(running, rng.randrange(1000))
        filled += len(running)
        for req in [req for req in running if len(req.output_ids) >= req.stop_after]:
            running.remove(req)
            host.finish(req)


def slabs_back(num_slabs: int, turn_overs: float) -> tuple[float, float]:
    """Share of the slabs not held by running requests (14 % of the memory) that come back when all
    evictable leaves go; and the share of text rows that no token is in, before."""
    rng = random.Random(1)
    host = Host(layout_of(num_slabs), RotateKConfig(), num_requests=512)
    text_traffic(host, host.allocator.layout.text_slots, 64, turn_overs, rng)
    running = host.running
    while sum(req.kv.kv_allocated_len for req in running) < 0.14 * host.allocator.layout.text_slots:
        host.prefill_whole(
            host.start([LARGE, rng.randrange(LARGE), *rng.choices(range(1000), k=100)])
        )
    unused = 1 - host.slabs.text_tokens / (host.slabs.of_text * TEXT_ROWS)
    host.tree.make_room(LARGE)
    held = sum(-(-req.kv.kv_allocated_len // TEXT_ROWS) for req in running)
    host.tree.check_integrity(idle=False)
    return host.slabs.free / (num_slabs - held), unused


def one_image(host: StockHost, num_tokens: int, turn_overs: float) -> tuple[float, float, float]:
    """On a server full of text: cached tokens that one image evicts, and microseconds of its
    admission and its rows."""
    rng = random.Random(2)
    text_traffic(host, num_tokens, 64, turn_overs, rng)
    results = []
    for number in range(9):
        # Text takes what is free, so that the image has to evict all that it needs.
        for _ in range(100):
            tokens = rng.choices(range(1000), k=100)
            host.finish(host.prefill_whole(host.start([LARGE, rng.randrange(LARGE), *tokens])))
            if (
                host.slabs.free * TEXT_ROWS
                if isinstance(host, Host)
                else host.allocator.available_size()
            ) < 160:
                break
        cached = host.tree.total_size()
        req, admission_us = admit(host, [1, *image(IMAGE_TOKENS, number), 2])
        req.extend_end = len(req.origin_input_ids)
        start = time.perf_counter()
        host.alloc_for_extend([req])
        rows_us = (time.perf_counter() - start) * 1e6
        results.append((cached - host.tree.total_size(), admission_us, rows_us))
        host.finish(req, insert=False)
    return tuple(statistics.median(column) for column in zip(*results, strict=True))


def chat_of(images: int) -> list[int]:
    return sum(
        ([*image(IMAGE_TOKENS, number), *range(TEXT_TOKENS)] for number in range(images)), [7]
    )


def open_slab_waste(chats: int = 20, turns: int = 3) -> float:
    """Share of rows in open slabs without a token, of chats of one image and ``turns`` turns of
    text."""
    host = Host(layout_of(chats * 130), RotateKConfig(), num_requests=64, context=8192)
    rng = random.Random(3)
    for number in range(chats):
        ids = [number, *image(IMAGE_TOKENS, number)]
        for _ in range(turns):
            question, answer = (TEXT_TOKENS // turns // 2 + rng.randint(-9, 9) for _ in range(2))
            req = host.prefill_whole(host.start([*ids, *rng.choices(range(1000), k=question)]))
            for token in rng.choices(range(1000), k=answer):
                assert host.decode_all([req], token)
            ids = [*req.origin_input_ids, *req.output_ids[:-1]]
            host.finish(req)
    rows = host.slabs.of_text * TEXT_ROWS - host.slabs.text_tokens
    return rows / (host.slabs.of_text * TEXT_ROWS + host.slabs.visual_tokens)


def long_chats(host: StockHost, repeats: int, images: int = 20) -> dict[str, float]:
    """A chat of many images: admission of its first turn and of its next, rows, checkpoint and
    end."""
    prompt = chat_of(images)
    times: dict[str, list[float]] = {}

    def clock(name: str, step: Callable[[], object]) -> None:
        start = time.perf_counter()
        step()
        times.setdefault(name, []).append((time.perf_counter() - start) * 1e6)

    for _ in range(repeats):
        host.tree.evict_all()
        req, us = admit(host, prompt)
        times.setdefault("admission, cold", []).append(us)
        req.extend_end = len(prompt)
        clock("rows of the prefill", lambda: host.alloc_for_extend([req]))
        clock("checkpoint", lambda: checkpoint_kv_cache(req, host.tree))
        req.output_ids.append(1)
        assert host.decode_all([req], 2)
        clock("end", lambda: host.finish(req))
        req, us = admit(host, [*prompt, 1, 2, 3])
        times.setdefault("admission, next turn", []).append(us)
        host.tree.unlock(req.lock)
        host.running.remove(req)
    return {name: statistics.median(values) for name, values in times.items()}


def decode_step(host: StockHost, batch: int, repeats: int) -> float:
    running = [host.prefill_whole(host.start([number, *range(50)])) for number in range(batch)]

    def account() -> None:
        for req in running:
            req.output_ids.append(1)

    us = median_us(lambda: host.alloc_for_decode(running), repeats, account)
    for req in running:
        host.finish(req)
    return us


def evict_everything(host: StockHost) -> None:
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    host.tree.evict(EvictParams(num_tokens=LARGE))


def measure(quick: bool) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []

    def add(what: str, rotatek: float, stock: float | None = None, unit: str = "us") -> None:
        ratio = f"{rotatek / stock:.2f}" if stock else ""
        row = dict(
            zip(
                FIELDS,
                (what, f"{rotatek:.4g}", f"{stock:.4g}" if stock else "", ratio, unit),
                strict=True,
            )
        )
        rows.append(row)
        print("{what:58} {rotatek:>9} {stock:>9} {ratio:>7}  {unit}".format(**row), flush=True)

    repeats = 5 if quick else 31
    for tokens in (32_000, 100_000):
        ids = array("q", range(tokens))
        add(
            f"find the images of a prompt of {tokens} text tokens",
            median_us(lambda: image_runs(ids), repeats),
        )
    ids = array("q", chat_of(20))
    add(
        f"find the 20 images of a chat of {len(ids)} tokens",
        median_us(lambda: image_runs(ids), repeats),
    )

    num_slabs, turn_overs = (1000, 2) if quick else (4000, 6)
    back, unused = slabs_back(num_slabs, turn_overs)
    add(f"slabs back after {turn_overs} turn-overs by text, 14 % running", back, unit="share")
    add("text rows without a token, short text chats", unused, unit="share")
    add("rows unused in open slabs, image chats of 2928 + 161", open_slab_waste(), unit="share")
    layout = layout_of(num_slabs)
    hosts = (
        Host(layout, RotateKConfig(), num_requests=512),
        StockHost(layout.text_slots, num_requests=512),
    )
    names, units = (
        ("cached tokens evicted", "admission", "eviction and its rows"),
        ("tokens", "us", "us"),
    )
    columns = zip(
        names,
        units,
        *(one_image(host, layout.text_slots, turn_overs) for host in hosts),
        strict=False,
    )
    for name, unit, ours, stock in columns:
        add(f"one image on a server full of text: {name}", ours, stock, unit)

    context = len(chat_of(20)) + 200
    ours = Host(layout_of(5000), RotateKConfig(), num_requests=4, context=context)
    stock = StockHost(100_000, num_requests=4, context=context)
    for host in (ours, stock):
        host.tree.evict_all = lambda host=host: evict_everything(host)
    times, stock_times = long_chats(ours, repeats), long_chats(stock, repeats)
    for name, us in times.items():
        add(f"chat of 20 images: {name}", us, stock_times[name])
    for batch in (1, 64, 256):
        ours, stock = (
            Host(layout_of(5000), RotateKConfig(), num_requests=batch),
            StockHost(100_000, num_requests=batch),
        )
        add(
            f"rows of a decode step, batch {batch}",
            decode_step(ours, batch, 200),
            decode_step(stock, batch, 200),
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a quarter of the memory, few repeats: to see that it runs",
    )
    parser.add_argument("--csv", type=Path, help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    publish(ServerArgs(model_path="dummy", device="cpu"), role="scheduler")
    rows = measure(args.quick)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*FIELDS, "machine"])
            writer.writeheader()
            writer.writerows({**row, "machine": f"{platform.machine()}, one core"} for row in rows)


if __name__ == "__main__":
    main()
