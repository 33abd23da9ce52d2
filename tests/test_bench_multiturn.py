"""bench_multiturn.py against a server that streams what a test says."""

from __future__ import annotations

import asyncio
import json

import bench_multiturn
import pytest
from aiohttp import web
from bench_multiturn import NOT_SENT, TurnRecord, percentile
from server_process import free_port

DONE = "[DONE]"
USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 1}}


def delta(text: str) -> dict:
    return {"choices": [{"delta": {"content": text}}]}


def bench(monkeypatch, *events: dict | str) -> tuple[list[TurnRecord], list[dict]]:
    """The records of one client with two turns, and the bodies of its requests; every answer
    streams ``events``."""
    port, bodies = free_port(), []

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake"}]})

    async def complete(request: web.Request) -> web.Response:
        bodies.append(await request.json())
        lines = (event if event == DONE else json.dumps(event) for event in events)
        text = "".join(f"data: {line}\n\n" for line in lines)
        return web.Response(text=text, content_type="text/event-stream")

    async def run() -> tuple[list[TurnRecord], float]:
        app = web.Application()
        app.router.add_get("/v1/models", models)
        app.router.add_post("/v1/chat/completions", complete)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        try:
            return await bench_multiturn.run(bench_multiturn.parse_arguments())
        finally:
            await runner.cleanup()

    url = f"http://127.0.0.1:{port}"
    flags = ["--base-url", url, "--clients", "1", "--turns", "2", "--image-size", "28x28"]
    monkeypatch.setattr("sys.argv", ["bench_multiturn.py", *flags])
    return asyncio.run(run())[0], bodies


def test_text_is_put_together_and_timed(monkeypatch):
    records, _ = bench(monkeypatch, delta("a"), delta("b"), USAGE, DONE)
    assert [(record.text, record.error, record.prompt_tokens) for record in records] == [
        ("ab", None, 7)
    ] * 2
    assert all(0 < record.ttft_s <= record.latency_s for record in records)


@pytest.mark.parametrize("events", [(), (delta(""),)], ids=["no delta", "an empty delta"])
def test_an_empty_answer_is_no_error_and_the_chat_goes_on(events, monkeypatch, capsys):
    records, bodies = bench(monkeypatch, *events, USAGE, DONE)
    assert [(record.text, record.error, record.ttft_s) for record in records] == [
        ("", None, None)
    ] * 2
    assert all(record.latency_s > 0 for record in records)
    assert bodies[1]["messages"][-2] == {"role": "assistant", "content": ""}
    bench_multiturn.print_summary(records, 1.0)
    first_turn = capsys.readouterr().out.splitlines()[1].split()
    assert first_turn[:3] == ["1", "-", "-"]  # no time to a first token
    assert first_turn[-1] == "0/1"


@pytest.mark.parametrize(
    ("events", "error"),
    [
        ((delta("a"),), "the stream ended before [DONE]"),
        ((), "the stream ended before [DONE]"),
        (({"error": "no memory"}, DONE), 'in the stream: "no memory"'),
    ],
    ids=["cut short", "nothing", "an error"],
)
def test_a_stream_that_does_not_end_properly_is_an_error(events, error, monkeypatch):
    records, bodies = bench(monkeypatch, *events)
    assert [record.error for record in records] == [error, NOT_SENT]
    assert len(bodies) == 1


def test_percentiles_leave_out_what_was_not_measured():
    assert percentile([4.0, None, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.9) == pytest.approx(1.9)
    assert percentile([None], 0.5) is None
