"""Several servers behind a router: the arguments, the GPUs of each, and the header that clients
send."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import bench_multiturn
import demo
import eval_vlm
import psutil
import pytest
import requests
from aiohttp import web
from chats import QUESTIONS, Chat, hold_chats, image_part
from conftest import ROOT, START_SECONDS
from routing import ROUTING_KEY_HEADER, routing_headers
from serve_many import (
    check_ports,
    deal_gpus,
    forget,
    make_router,
    make_servers,
    parse_arguments,
    visible_gpus,
)
from server_process import ServerError, free_port
from soak import rotatek_info
from tasks import HELD_OUT_SEED, make_picture


def test_flags_that_are_not_ours_go_to_the_servers_in_their_order():
    argv = "MODEL 2 --enable-rotatek --port 25000 --dtype float32 --tp=2 --po 5 --json {}".split()
    arguments, flags = parse_arguments(argv)
    assert (arguments.model, arguments.servers, arguments.host, arguments.port) == (
        "MODEL",
        2,
        "127.0.0.1",
        25000,
    )
    assert flags == "--enable-rotatek --dtype float32 --tp=2 --po 5 --json {}".split()


@pytest.mark.parametrize(
    "argv, message",
    [
        ("MODEL", "the following arguments are required: N"),
        ("MODEL two", "argument N: invalid int value: 'two'"),
        ("MODEL 0", "N is 0, expected at least 1 server"),
        (
            "MODEL 4 --port 65531",
            "--port 65531 needs the ports 65531 to 65536, expected them within 1 to 65535",
        ),
    ],
)
def test_bad_arguments_end_with_a_sentence(argv, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(argv.split())
    assert message in capsys.readouterr().err


def test_gpus_are_dealt_evenly_and_in_order():
    assert deal_gpus([], 2) == [{}, {}]
    assert deal_gpus(["3", "5"], 2) == [
        {"CUDA_VISIBLE_DEVICES": "3"},
        {"CUDA_VISIBLE_DEVICES": "5"},
    ]
    dealt = deal_gpus([str(i) for i in range(9)], 4)
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in dealt] == [
        "0,1",
        "2,3",
        "4,5",
        "6,7",
    ]


def test_fewer_gpus_than_servers_are_refused():
    with pytest.raises(
        ServerError, match=r"3 servers need a GPU each, found 2 \(0, 1\); start 2 servers at most"
    ):
        deal_gpus(["0", "1"], 3)


def test_the_gpus_are_those_that_the_environment_names(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-ab")
    assert visible_gpus() == ["2", "GPU-ab"]


def test_each_server_has_a_port_of_its_own_and_the_router_knows_them_all(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    arguments, flags = parse_arguments(
        ["MODEL", "2", "--host", "0.0.0.0", "--port", "25000", "--enable-rotatek"]
    )
    servers = make_servers(arguments, flags)
    urls = [server.url for server in servers]
    assert urls == ["http://127.0.0.1:25001", "http://127.0.0.1:25002"]
    assert len({server.log_path for server in servers}) == 2
    command = " ".join(make_router(arguments, urls)._command)
    assert "--host 0.0.0.0 --port 25000" in command and "--prometheus-port 25003" in command
    assert "--policy manual" in command and command.endswith("--worker-urls " + " ".join(urls))


def test_a_port_in_use_is_named_before_anything_starts():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ServerError, match=f"port {port} of 127.0.0.1 is not free .*choose another --port"
        ):
            check_ports("127.0.0.1", range(port, port + 1))


def test_a_chat_has_one_key_that_fits_a_header():
    headers = routing_headers("Bild \N{SNOWMAN}\n" * 1000)
    assert headers == routing_headers("Bild \N{SNOWMAN}\n" * 1000) != routing_headers("Bild")
    assert headers[ROUTING_KEY_HEADER].isalnum() and len(headers[ROUTING_KEY_HEADER]) == 32
    with pytest.raises(ValueError, match="the name of a chat is empty"):
        routing_headers("")


class FakeServer:
    """An OpenAI-compatible server, or a router, that notes the routing key of each chat
    completion."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.keys: list[str | None] = []
        self.workers = [
            {"id": "id-1", "url": "http://127.0.0.1:1"},
            {"id": "id-2", "url": "http://127.0.0.1:2"},
        ]

    def call(self, function, *args):
        """The result of the blocking ``function`` beside the running server."""

        async def run():
            app = web.Application()
            app.router.add_get("/v1/models", self._models)
            app.router.add_get("/server_info", self._server_info)
            app.router.add_post("/v1/chat/completions", self._complete)
            app.router.add_get("/workers", self._list_workers)
            app.router.add_delete("/workers/{id}", self._delete_worker)
            runner = web.AppRunner(app)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", self.port).start()
            try:
                return await asyncio.to_thread(function, *args)
            finally:
                await runner.cleanup()

        return asyncio.run(run())

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake"}]})

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response({"internal_states": [{"rotatek": {"tokens_compressed": 5}}]})

    async def _complete(self, request: web.Request) -> web.Response:
        self.keys.append(request.headers.get(ROUTING_KEY_HEADER))
        choice = {
            "message": {"content": "x"},
            "delta": {"content": "x"},
            "logprobs": {"content": [{"logprob": 0.0}]},
        }
        reply = {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}
        if (await request.json()).get("stream"):
            return web.Response(
                text=f"data: {json.dumps(reply)}\n\ndata: [DONE]\n\n",
                content_type="text/event-stream",
            )
        return web.json_response(reply)

    async def _list_workers(self, request: web.Request) -> web.Response:
        return web.json_response({"workers": self.workers})

    async def _delete_worker(self, request: web.Request) -> web.Response:
        self.workers = [
            worker for worker in self.workers if worker["id"] != request.match_info["id"]
        ]
        return web.json_response({"status": "accepted"})


def soak_client(url: str) -> None:
    turns = [[{"type": "text", "text": question}] for question in QUESTIONS[:3]]
    chats = [Chat(0, turns), Chat(1, turns, abort_turn=2)]
    asyncio.run(hold_chats(url, chats, concurrency=2, max_tokens=1))


def bench_client(url: str) -> None:
    argv = [
        "bench_multiturn.py",
        "--base-url",
        url,
        "--clients",
        "2",
        "--turns",
        "3",
        "--image-size",
        "28x28",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", argv)
        records, _ = asyncio.run(bench_multiturn.run(bench_multiturn.parse_arguments()))
    assert [record.error for record in records] == [None] * 6


def eval_client(url: str) -> None:
    flags = ["--url", url, "--pictures", "1", "--turns", "3", "--families", "charts", "scenes"]
    asyncio.run(eval_vlm.evaluate_server(eval_vlm.parse_arguments(flags)))


def demo_client(url: str) -> None:
    for seed in (HELD_OUT_SEED, HELD_OUT_SEED + 1):
        demo.hold_chat(url, make_picture("charts", seed))


@pytest.mark.parametrize("client", [soak_client, bench_client, eval_client, demo_client])
def test_a_client_sends_one_key_for_all_turns_of_a_chat_and_another_for_the_next_chat(client):
    server = FakeServer()
    server.call(client, server.url)
    keys = Counter(server.keys)
    assert None not in keys
    assert list(keys.values()) == [3, 3]


def test_a_dead_server_is_taken_out_of_the_router():
    router = FakeServer()
    router.call(forget, router.url, "http://127.0.0.1:2")
    assert [worker["id"] for worker in router.workers] == ["id-1"]


@dataclass
class Many:
    """A running serve_many.sh."""

    process: subprocess.Popen[str]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def server_urls(self) -> list[str]:
        return [f"http://127.0.0.1:{self.port + number}" for number in (1, 2)]

    def wait_for_line(self, start: str) -> None:
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if line.startswith(start):
                return
        pytest.fail("".join(lines))


@pytest.fixture(scope="module")
def many(servers, models) -> Iterator[Many]:
    servers.stop()
    port = free_port()
    command = [
        "bash",
        ROOT / "scripts" / "serve_many.sh",
        models["qwen2_5_vl"],
        "2",
        "--port",
        str(port),
    ]
    command += [
        "--start-timeout",
        str(START_SECONDS),
        "--enable-rotatek",
        "--rotatek-min-image-tokens",
        "16",
    ]
    command += ["--dtype", "float32", "--max-total-tokens", "6000"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"ROTATEK_VENV": os.environ.get("ROTATEK_VENV", sys.prefix)},
    )
    many = Many(process, port)
    try:
        many.wait_for_line("ready: 2 servers")
        yield many
    finally:
        process.terminate()
        process.wait(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    for url in (many.url, *many.server_urls):
        with pytest.raises(requests.ConnectionError, match="refused"):
            requests.get(f"{url}/health", timeout=5)


def hold_image_chats(url: str) -> list[Chat]:
    """Ten chats of two turns at a time, each about a picture of its own, that begin with the same
    words."""
    chats = [
        Chat(
            i,
            [
                [image_part(i, (336, 336)), {"type": "text", "text": QUESTIONS[0]}],
                [{"type": "text", "text": QUESTIONS[1]}],
            ],
        )
        for i in range(10)
    ]
    asyncio.run(hold_chats(url, chats, concurrency=10, max_tokens=4))
    return chats


needs_router = pytest.mark.skipif(
    importlib.util.find_spec("sglang_router") is None,
    reason="needs sglang-router: pip install -e '.[router]'",
)


@pytest.mark.server
@needs_router
def test_chats_spread_over_the_servers_and_their_later_turns_find_the_narrow_image(many):
    before = [rotatek_info(url)["images_compressed"] for url in many.server_urls]
    chats = hold_image_chats(many.url)
    after = [rotatek_info(url)["images_compressed"] for url in many.server_urls]
    compressed = [new - old for new, old in zip(after, before, strict=True)]
    # Each image once: no second turn met the other server.
    assert sum(compressed) == 10 and min(compressed) >= 3, compressed
    for chat in chats:
        first, second = chat.done
        assert second.cached_tokens >= first.prompt_tokens - 1 > 144


@pytest.mark.server
@needs_router
def test_when_a_server_dies_the_other_takes_its_chats(many):
    (server,) = (
        child
        for child in psutil.Process(many.process.pid).children()
        if str(many.port + 1) in child.cmdline()
    )
    os.killpg(server.pid, signal.SIGKILL)
    many.wait_for_line("the other 1 go on")
    assert all(len(chat.done) == 2 for chat in hold_image_chats(many.url))
