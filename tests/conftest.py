"""Shared by all tests: the tiny models, and real servers that are started once per configuration.

A worker runs one server at a time: asking for another configuration stops the one before. Without
a GPU, servers are forked from a process that has SGLang imported (preloaded.py).
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).parents[1]
START_SECONDS = 300  # for a server of seven processes on two cores
# The programs of scripts/ import each other by name.
SCRIPTS = ROOT / "scripts"
sys.path[:0] = map(
    str, (SCRIPTS, *(SCRIPTS / room for room in ("bench", "eval", "models", "common")))
)

from server_process import ServerProcess, free_port  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def models() -> dict[str, Path]:
    """Backbone name -> model directory: the trained models, and tiny ones with random weights,
    which are kept between runs until the scripts that make them change."""
    # Imports transformers, which tests of kernels do without.
    from make_tiny_model import DEFAULT_NAMES, make_model

    sources = [
        ROOT / "scripts" / "models" / "make_tiny_model.py",
        ROOT / "scripts" / "models" / "architectures.py",
        *sorted((ROOT / "scripts" / "models" / "tiny_models").glob("*.py")),
    ]
    version = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    paths = {
        "reader_qwen2_5_vl": ROOT / "scripts" / "models" / "reader-qwen2.5-vl",
        "reader_llava_next": ROOT / "scripts" / "models" / "reader-llava-next",
    }
    folder = ROOT / ".cache" / "models" / version
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # there are other workers
        for backbone, name in DEFAULT_NAMES.items():
            paths[backbone] = folder / name
            if not (folder / name / "config.json").exists():
                make_model(folder / name, backbone)
    return paths


class PreloadedPython:
    """What serve.sh takes for its Python, with SGLang imported in the environment ``env``."""

    def __init__(self, env: dict[str, str], log: Path) -> None:
        # Sockets have short names only.
        self._directory = tempfile.TemporaryDirectory(prefix="rotatek")
        socket = Path(self._directory.name, "socket")
        program = shlex.join([sys.executable, str(Path(__file__).with_name("preloaded.py"))])
        self.executable = Path(self._directory.name, "python")
        self.executable.write_text(f'#!/bin/sh\nexec {program} {socket} "$@"\n')
        self.executable.chmod(0o755)
        script = f". {shlex.quote(str(ROOT / 'scripts' / 'env.sh'))}; export_cpu_environment; "
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                ["bash", "-c", f"{script} exec {program} {socket} serve"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | env,
            )
        deadline = time.monotonic() + START_SECONDS
        while not socket.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"SGLang was not imported: {log.read_text(errors='replace')}")
            time.sleep(0.1)

    def stop(self) -> None:
        """And the servers that were forked from it."""
        self._process.stdin.close()
        self._process.wait()
        self._directory.cleanup()


class Servers:
    """Starts the server of a configuration unless it is the one that runs."""

    def __init__(self, models: dict[str, Path], log_dir: Path) -> None:
        self._models = models
        self._log_dir = log_dir
        self._running: ServerProcess | None = None
        self._key: tuple | None = None
        self._preloaded: dict[tuple, PreloadedPython] = {}

    def get(
        self,
        backbone: str,
        *flags: str,
        env: dict[str, str] | None = None,
        preload: bool = True,
        preload_env: dict[str, str] | None = None,
    ) -> ServerProcess:
        """``preload_env``: for SGLang's modules to find when they are imported, and the server.
        Without ``preload`` all processes of the server are new interpreters."""
        env = (env or {}) | (preload_env or {})
        key = (backbone, flags, tuple(sorted(env.items())), preload)
        if key != self._key or not self._running.is_alive():
            self.stop()
            log = (
                self._log_dir
                / f"{backbone}-{hashlib.sha256(repr(key).encode()).hexdigest()[:8]}.log"
            )
            environment = {"SGLANG_ROTATEK_DEBUG": "1"} | env
            if preload and not torch.cuda.is_available():
                python = self._preloaded_python(preload_env or {})
                environment["ROTATEK_PYTHON"] = str(python.executable)
            # Of the machine, such as kernels that a GPU host without a compiler can run.
            flags = (*flags, *shlex.split(os.environ.get("ROTATEK_TEST_SERVER_FLAGS", "")))
            self._running = ServerProcess(
                self._models[backbone], free_port(), flags, log, environment, START_SECONDS
            )
            self._running.start()
            self._key = key
        return self._running

    def _preloaded_python(self, env: dict[str, str]) -> PreloadedPython:
        key = tuple(sorted(env.items()))
        if key not in self._preloaded:
            log = self._log_dir / f"preloaded-{len(self._preloaded)}.log"
            self._preloaded[key] = PreloadedPython(env, log)
        return self._preloaded[key]

    def stop(self) -> None:
        if self._running is not None:
            self._running.stop()
        self._running = self._key = None

    def close(self) -> None:
        self.stop()
        for python in self._preloaded.values():
            python.stop()


@pytest.fixture(scope="session")
def servers(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    running = Servers(models, tmp_path_factory.mktemp("servers"))
    yield running
    running.close()


@pytest.fixture(scope="session", autouse=True)
def cpu_engine() -> None:
    """Modules of SGLang that tests import must know, as its servers do, that there is no GPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")


@pytest.fixture(scope="session")
def host_configuration(cpu_engine) -> None:
    """The host's scheduler classes read its configuration of the process, as if a server had
    started."""
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import ServerArgs

    publish(ServerArgs(model_path="dummy", device="cpu"), role="scheduler")
