"""Servers as child processes: started, waited for, killed with all their workers."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

SERVE_SCRIPT = Path(__file__).resolve().parents[1] / "serve.sh"
POLL_SECONDS = 0.25


class ServerError(RuntimeError):
    """The server died or did not become healthy in time; the message ends with the tail of its
    log."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listened on a moment ago.

    The server binds it seconds later, so it lies below the ports that kernels hand to outgoing
    connections.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ServerError("no free TCP port among 100 tried between 20000 and 32000; stop some servers")


class ChildServer:
    """Context manager for a process that listens on ``port``: healthy on entry, killed on exit.

    stdout and stderr go to ``log_path`` (overwritten); ``env`` is laid over the environment of this
    process.
    Healthy means that GET ``health_path`` answers 200.
    """

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        log_path: Path | str,
        env: Mapping[str, str] | None = None,
        timeout_seconds: float = 300,
        health_path: str = "/health",
    ) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log_path = Path(log_path)
        self.timeout_seconds = timeout_seconds
        self._health_url = self.url + health_path
        self._command = list(command)
        self._env = dict(os.environ) | dict(env or {})
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and return when it is healthy; ServerError (and no process left)
        otherwise."""
        self.launch()
        try:
            self.wait_until_healthy()
        except BaseException:
            self.stop()
            raise

    def launch(self) -> None:
        """Start the process and return at once."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as log:
            # Its own session is its own process group: the scheduler and the detokenizer belong to
            # it too.
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
            )

    def wait_until_healthy(self) -> None:
        """Return when the launched process is healthy; ServerError when it dies or takes
        ``timeout_seconds``."""
        deadline = time.monotonic() + self.timeout_seconds
        while time.monotonic() < deadline:
            if not self.is_alive():
                raise self._error(
                    f"the server exited with code {self._process.returncode} while starting"
                )
            if self._is_healthy():
                return
            time.sleep(POLL_SECONDS)
        raise self._error(
            f"the server at {self.url} was not healthy within {self.timeout_seconds:.0f} s"
        )

    def stop(self) -> None:
        """Kill the process group. Not SIGTERM: SGLang takes it for a crash of its workers and needs
        seconds."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log_tail(self, lines: int = 40) -> str:
        if not self.log_path.exists():
            return ""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(self._health_url, timeout=5) as response:
                return response.status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def _error(self, what: str) -> ServerError:
        return ServerError(f"{what}; the end of {self.log_path}:\n{self.log_tail()}")


class ServerProcess(ChildServer):
    """An SGLang server, started by ``serve.sh MODEL --host 127.0.0.1 --port PORT`` and ``flags``.

    with ServerProcess(model, port, ["--enable-rotatek"], log_path) as server:
        requests.get(server.url + "/server_info")

    Unless ROTATEK_VENV is set, it runs in the Python environment of this process.
    """

    def __init__(
        self,
        model: Path | str,
        port: int,
        flags: Sequence[str],
        log_path: Path | str,
        env: Mapping[str, str] | None = None,
        timeout_seconds: float = 300,
    ) -> None:
        command = [
            "bash",
            str(SERVE_SCRIPT),
            str(model),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            *flags,
        ]
        env = {"ROTATEK_VENV": os.environ.get("ROTATEK_VENV", sys.prefix)} | dict(env or {})
        super().__init__(command, port, log_path, env, timeout_seconds)
