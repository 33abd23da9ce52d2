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
import os
import shlex
import sys
import tempfile
import time
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

from bench_multiturn import parse_size
from bench_records import append_rows, machine_lines, plot, rows_with_populations
from bench_scenarios import DEVICE_CHATS, SCENARIOS, TIER, TTFT_CHATS, Bench, say
from server_process import ServerError, ServerProcess, free_port

ROOT = Path(__file__).resolve().parents[2]
FP8 = ["--kv-cache-dtype", "fp8_e4m3"]
ROTATEK = ["--enable-rotatek"]
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
SERVERS |= {name + TIER: [*SERVERS[name], "--enable-hierarchical-cache"] for name in DEVICE_CHATS}
# Model type -> pixels of a picture of 1225 or 2928 visual tokens.
IMAGE_SIZES = {"qwen2_5_vl": (980, 980), "llava_next": (672, 672)}
WARMUP_CHATS = 8
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
