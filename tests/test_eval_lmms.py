"""The task of lmms-eval about the held-out pictures, and lmms.sh. test_server_answers.py asks a
server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT
from datasets import Dataset
from server_process import free_port
from tasks import FAMILIES, HELD_OUT_SEED, make_picture

FOLDER = ROOT / "scripts" / "eval" / "lmms"


@pytest.fixture
def reader_questions(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import reader_questions

    return reader_questions


def rows_of(reader_questions) -> Dataset:
    lines = (FOLDER / "pictures.jsonl").read_text().splitlines()
    return reader_questions.questions(Dataset.from_list([json.loads(line) for line in lines]))


def test_the_task_is_the_first_held_out_pictures_of_all_families(reader_questions):
    rows = rows_of(reader_questions)
    assert [(row["family"], row["seed"], row["question"], row["answer"]) for row in rows] == [
        (family, seed, question.text, question.answer)
        for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + 20)
        for family in ("documents", "charts", "scenes")
        for question in make_picture(family, seed).questions
    ]
    assert {row["family"] for row in rows} == set(FAMILIES)


def test_a_question_comes_with_its_picture_and_is_right_up_to_blanks(reader_questions):
    row = rows_of(reader_questions)[0]
    [image] = reader_questions.images(row)
    assert image == make_picture(row["family"], row["seed"]).image
    for answer, right in ((f" {row['answer']}\n", 1), (row["answer"] + "x", 0), ("", 0)):
        assert reader_questions.score(row, [answer]) == {"exact_match": right}


@pytest.fixture
def script(tmp_path):
    """Runs lmms.sh, with this Python and a stand-in for lmms-eval that says what it is given to
    say; returns the exit status, stdout and stderr."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)

    def run(arguments: list[str], url: str, says: str = "") -> tuple[int, str, str]:
        (tmp_path / "lmms_eval.py").write_text(f"import sys\nprint(sys.argv[1:], {says!r})\n")
        ours = {"ROTATEK_LMMS_VENV": tmp_path, "PYTHONPATH": tmp_path, "ROTATEK_URL": url}
        command = ["bash", ROOT / "scripts" / "eval" / "lmms.sh", *arguments]
        done = subprocess.run(command, env=os.environ | ours, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def url():
    """A server that answers /v1/models with one model."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            if self.path == "/v1/models":
                self.wfile.write(b'{"object": "list", "data": [{"id": "org/model"}]}')

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_lmms_eval_gets_the_server_its_model_our_tasks_and_the_flags(script, url):
    status, output, _ = script(["chartqa", "--limit", "8"], url)
    assert status == 0
    assert f"'base_url={url}/v1,model_version=org/model," in output
    assert "'--include_path', 'scripts/eval/lmms', '--tasks', 'chartqa', '--limit', '8'" in output


@pytest.mark.parametrize("line", ["Error during evaluation: no data", "All 5 attempts failed."])
def test_errors_after_which_lmms_eval_exits_with_0_do_not(script, url, line):
    status, output, error = script(["chartqa"], url, line)
    assert status == 1 and line in output and "error: lmms-eval had errors" in error


def test_what_is_missing_ends_with_a_sentence(script, tmp_path):
    nobody = f"http://127.0.0.1:{free_port()}"
    for arguments, message in (
        (["--limit", "3"], "usage: scripts/eval/lmms.sh TASKS"),
        (["chartqa"], f"{nobody}/v1/models lists no model; start a server"),
    ):
        status, output, error = script(arguments, nobody)
        assert status == 1 and not output and message in error
    (tmp_path / "bin" / "python").unlink()
    status, _, error = script(["chartqa"], nobody)
    assert status == 1 and f"no lmms-eval at {tmp_path}; make it: python3.11 -m venv" in error
