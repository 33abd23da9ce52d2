"""eval_vlm.py: its arithmetic, its errors, and the accuracy of the two trained models."""

from __future__ import annotations

import asyncio
import json
import math
import shutil

import eval_vlm
import pytest
from aiohttp import web
from conftest import ROOT
from eval_vlm import (
    EvalError,
    Rate,
    Record,
    length_class,
    make_report,
    parse_arguments,
    print_report,
    summarise,
)
from server_process import free_port

QWEN = ROOT / "scripts" / "models" / "reader-qwen2.5-vl"
SHIPPED = [QWEN, ROOT / "scripts" / "models" / "reader-llava-next"]
FEW = ["--model", str(QWEN), "--pictures", "1", "--turns", "1", "--families", "charts"]


def record(family="charts", seed=1, turn=1, kind="value", truth="12", answer="12"):
    return Record(family, seed, turn, kind, "What is it?", truth, answer)


RECORDS = [
    record(),
    record(turn=2, truth="a, b and something more", answer=" a, b and something more\n"),
    record(turn=3, answer="13"),
    record(seed=2, answer="21"),
    record("scenes", truth="7", answer="7", kind="count color"),
    record("scenes", turn=10, truth="x" * 30, answer="x" * 29, kind="list"),
]


def report_of(records, *flags):
    return make_report(parse_arguments([*FEW, *flags]), records, "a model", None)


def run(*argv):
    return eval_vlm.run(parse_arguments(list(argv)))


@pytest.mark.parametrize("model", SHIPPED, ids=lambda path: path.name)
def test_the_trained_model_answers_pictures_that_it_never_saw(model, tmp_path, capsys):
    output = tmp_path / "results" / "result.json"
    code = run("--model", str(model), "--pictures", "3", "--require", "80", "--output", str(output))
    report = json.loads(output.read_text())
    assert code == 0, report["wrong"]
    assert report["rates"]["family"]["all"]["number"] == 27
    assert report["model"] == str(model)
    assert report["server"] is None
    assert "documents" in capsys.readouterr().out


def test_a_turn_is_right_when_the_stripped_answer_is_the_truth():
    assert [entry.is_right for entry in RECORDS] == [True, True, False, False, True, False]


def test_a_blank_within_the_answer_is_wrong():
    assert not record(truth="a b", answer="a  b").is_right
    assert not record(truth="a b", answer="A b").is_right


def test_rates_are_counted_per_family_length_turn_and_kind():
    rates = report_of(RECORDS)["rates"]
    assert rates["family"]["charts"] == {
        "number": 4,
        "right": 2,
        "exact_match_percent": 50.0,
        "standard_error_percent": round(100 * math.sqrt(2 * (0.5**2 + 0.5**2)) / 4, 2),
    }
    assert rates["family"]["all"]["right"] == 3
    assert {name: group["number"] for name, group in rates["answer length"].items()} == {
        "1": 1, "2-9": 3, "10-29": 1, "30+": 1,
    }  # fmt: skip
    assert rates["family and answer length"]["scenes, 30+"]["right"] == 0
    assert list(rates["turn"]) == ["1", "2", "3", "10"]
    assert rates["kind"]["scenes/count color"]["exact_match_percent"] == 100.0


def test_one_turn_a_picture_has_the_binomial_standard_error():
    rate = Rate.of([(("charts", seed), seed % 4 > 0) for seed in range(400)])
    assert rate.share == 0.75
    assert rate.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 399))


def test_turns_that_fail_together_count_as_one_cluster():
    alone = Rate.of([(("charts", seed), seed % 2 > 0) for seed in range(120)])
    together = Rate.of([(("charts", seed // 3), seed // 3 % 2 > 0) for seed in range(120)])
    assert together.share == alone.share
    assert together.standard_error == pytest.approx(alone.standard_error * math.sqrt(3), rel=0.02)


def test_one_picture_alone_has_no_infinite_error():
    assert Rate.of([(("charts", 1), True)]).standard_error == 0


@pytest.mark.parametrize(
    ("tokens", "name"),
    [(1, "1"), (2, "2-9"), (9, "2-9"), (10, "10-29"), (29, "10-29"), (30, "30+"), (500, "30+")],
)
def test_length_classes(tokens, name):
    assert length_class(tokens) == name


def test_every_wrong_answer_is_in_the_result():
    wrong = report_of(RECORDS)["wrong"]
    assert [(entry["family"], entry["seed"], entry["turn"]) for entry in wrong] == [
        ("charts", 1, 3), ("charts", 2, 1), ("scenes", 1, 10),
    ]  # fmt: skip
    assert wrong[0] == {
        "family": "charts", "seed": 1, "turn": 3, "kind": "value", "question": "What is it?",
        "truth": "12", "answer": "13",
    }  # fmt: skip


def test_an_earlier_result_stands_beside_this_one(capsys):
    now = [record(seed=seed, answer="12" if seed > 0 else "0") for seed in range(10)]
    before = [record(seed=seed, answer="12" if seed < 8 else "0") for seed in range(10)]
    print_report(report_of(now), now, report_of(before), ROOT / "earlier.json")
    header, _, row = capsys.readouterr().out.splitlines()[:3]
    assert header.split()[-6:] == ["earlier", "%", "s.e.", "change", "lost", "gained"]
    # group, turns, exact %, s.e., earlier %, s.e., change, lost, gained
    assert row.split() == ["charts", "10", "90.00", "10.00", "80.00", "13.33", "+10.00", "1", "2"]


def test_rates_of_an_earlier_result_follow_from_its_wrong_answers():
    wrong = {record.key for record in RECORDS if not record.is_right}
    report = report_of(RECORDS)
    assert eval_vlm.wrong_keys(json.loads(json.dumps(report))) == wrong
    assert (
        summarise(RECORDS, wrong)["family"]["all"].right
        == report["rates"]["family"]["all"]["right"]
    )


def test_an_earlier_result_of_other_pictures_is_refused(tmp_path):
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(report_of([record()], "--seed", "3")))
    with pytest.raises(
        EvalError, match=r"is of other pictures: expected .*1000000000.*got .*1003000000"
    ):
        run(*FEW, "--compare", str(path))


def test_an_earlier_result_of_another_generator_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(report_of([record(truth="what was true then")])))
    monkeypatch.setattr(
        eval_vlm, "evaluate_checkpoint", lambda arguments: ([record()], "a model", None)
    )
    with pytest.raises(EvalError, match="scripts/common/tasks differs"):
        run(*FEW, "--compare", str(path))


@pytest.mark.parametrize(
    "text", ["", "{}", '{"pictures": 3}'], ids=["empty", "no result", "a number"]
)
def test_an_earlier_result_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "earlier.json"
    path.write_text(text)
    with pytest.raises(EvalError, match="is no --output of this program"):
        run(*FEW, "--compare", str(path))
    with pytest.raises(EvalError, match="absent.json is no --output"):
        run(*FEW, "--compare", str(tmp_path / "absent.json"))


def test_a_family_below_the_required_share_is_exit_code_1(monkeypatch, capsys):
    monkeypatch.setattr(
        eval_vlm, "evaluate_checkpoint", lambda arguments: (RECORDS, "a model", None)
    )
    assert run(*FEW) == 0
    assert run(*FEW, "--require", "50") == 0
    assert run(*FEW, "--require", "50.1") == 1
    assert "below the required 50.1 %: charts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "one of the arguments --url --model is required"),
        (["--url", "http://x", "--model", "y"], "not allowed with"),
        ([*FEW, "--families", "maps"], "invalid choice: 'maps'"),
        ([*FEW, "--pictures", "0"], "0 is not at least 1"),
        ([*FEW, "--seed", "-1"], "may have been trained on"),
        ([*FEW, "--pictures", "1000001"], "expected 1000000 at most"),
        ([*FEW, "--dtype", "int4"], "invalid choice: 'int4'"),
    ],
    ids=lambda value: "" if isinstance(value, list) else value.split(":")[0],
)
def test_a_bad_command_line_is_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse_arguments(argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_the_v1_of_a_url_and_the_order_of_families_do_not_matter():
    arguments = parse_arguments(
        ["--url", "http://x:1/v1/", "--families", "scenes", "charts", "scenes"]
    )
    assert arguments.url == "http://x:1"
    assert arguments.families == ["charts", "scenes"]


def test_a_bad_model_directory_is_refused(tmp_path):
    with pytest.raises(EvalError, match="cannot load .*absent on cpu"):
        run("--model", str(tmp_path / "absent"))
    for file in QWEN.iterdir():
        shutil.copy(file, tmp_path)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(EvalError, match="cannot load .* file not fully covered"):
        run("--model", str(tmp_path))


class FakeServer:
    """Answers like SGLang with canned text, and keeps what it was asked."""

    def __init__(self, status=200):
        self.status, self.bodies = status, []

    async def models(self, request):
        return web.json_response({"data": [{"id": "fake"}]})

    async def info(self, request):
        state = {"rotated_tokens": 5}
        return web.json_response(
            {"enable_rotatek": True, "port": 1, "internal_states": [{"rotatek": state}]}
        )

    async def chat(self, request):
        self.bodies.append(await request.json())
        if self.status != 200:
            return web.json_response({"message": "the picture is too large"}, status=self.status)
        return web.json_response(
            {"choices": [{"message": {"content": f"answer {len(self.bodies)}"}}]}
        )

    async def evaluate(self, *flags):
        app = web.Application(client_max_size=2**26)
        app.add_routes([web.get("/v1/models", self.models), web.get("/server_info", self.info)])
        app.add_routes([web.post("/v1/chat/completions", self.chat)])
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            port = free_port()
            await web.TCPSite(runner, "127.0.0.1", port).start()
            arguments = parse_arguments(["--url", f"http://127.0.0.1:{port}", *flags])
            return await eval_vlm.evaluate_server(arguments)
        finally:
            await runner.cleanup()


def test_a_chat_keeps_the_answers_of_the_model_and_sends_its_picture_once():
    fake = FakeServer()
    flags = ("--pictures", "1", "--turns", "2", "--families", "charts")
    records, model, server = asyncio.run(fake.evaluate(*flags))
    assert model == "fake"
    assert server == {"enable_rotatek": True, "rotatek_state": {"rotated_tokens": 5}}
    first, second = (body["messages"] for body in fake.bodies)
    assert second[0] == first[0]
    assert [part["type"] for part in first[0]["content"]] == ["image_url", "text"]
    assert (
        second[1] == {"role": "assistant", "content": "answer 1"} != {"content": records[0].truth}
    )
    assert second[2] == {"role": "user", "content": [{"type": "text", "text": records[1].question}]}
    assert all(body["temperature"] == 0 for body in fake.bodies)
    assert [record.key for record in records] == [("charts", 10**9, 1), ("charts", 10**9, 2)]


def test_chats_held_together_give_the_same_records_in_the_same_order():
    flags = ("--pictures", "4", "--turns", "2", "--concurrency")
    asked = [
        [
            (record.key, record.question)
            for record in asyncio.run(FakeServer().evaluate(*flags, number))[0]
        ]
        for number in ("1", "8")
    ]
    assert asked[0] == asked[1]
    assert len(asked[0]) == 24


def test_a_refused_request_is_named_with_the_words_of_the_server():
    expected = "family charts, seed 1000000000, turn 1: HTTP 400: .*the picture is too large"
    with pytest.raises(EvalError, match=expected):
        asyncio.run(FakeServer(status=400).evaluate("--pictures", "2", "--families", "charts"))


def test_a_url_without_a_server_is_refused():
    with pytest.raises(EvalError, match="no answer from http://127.0.0.1:9/v1/models .*set --url"):
        run("--url", "http://127.0.0.1:9")
