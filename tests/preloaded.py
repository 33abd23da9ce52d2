"""A stand-in for ``python`` that forks servers from a process which has SGLang imported.

Most of a server's start on the CPU are imports, ten seconds in each of its processes. Run as

    python preloaded.py SOCKET serve

it imports SGLang without plugins, and until its stdin ends it forks one process for each

    python preloaded.py SOCKET -m sglang.launch_server [flags...]

which stands for that process: its environment and output are used, its end, even by SIGKILL, ends
the server, and the server's exit status is its own. The processes of a server that multiprocessing
would spawn are forked from one that is as fresh, so each still loads its plugins by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import multiprocessing.context
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker, spawn, util
from typing import NoReturn

MODULE = ["-m", "sglang.launch_server"]
PR_SET_PDEATHSIG = 1
MAX_REQUEST = 1 << 17  # bytes; an environment and flags are some thousand


def main() -> None:
    address, arguments = sys.argv[1], sys.argv[2:]
    if arguments == ["serve"]:
        serve(address)
    elif arguments[:2] == MODULE:
        sys.exit(ask(address, arguments[2:]))
    else:
        os.execv(sys.executable, [sys.executable, *arguments])


def ask(address: str, flags: list[str]) -> int:
    """The exit status of the server."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(address)
        request = {"flags": flags, "environment": dict(os.environ), "directory": os.getcwd()}
        socket.send_fds(connection, [json.dumps(request).encode()], [1, 2])
        return int(connection.recv(16) or b"1")


def serve(address: str) -> NoReturn:
    """Fork servers until stdin ends, then kill those that run."""
    # Before uvicorn is imported, which keeps its context.
    contexts = multiprocessing.context._concrete_contexts
    contexts["spawn"] = contexts["forkserver"]
    ship_the_environment()
    import_sglang()
    assert threading.active_count() == 1, threading.enumerate()  # the only one that a fork has
    ended_r, ended_w = os.pipe()
    os.set_blocking(ended_w, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(ended_w)
    selector = selectors.DefaultSelector()
    servers: dict[int, socket.socket] = {}  # process id -> its client
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address + ".part")
        listener.listen()
        os.rename(address + ".part", address)  # from now on there is someone who answers
        for source in (0, listener, ended_r):
            selector.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj == 0:
                    for pid in servers:
                        kill(pid)
                    os._exit(0)  # at once: thousands of modules take seconds to be let go of
                if key.fileobj is listener:
                    client, _ = listener.accept()
                    pid = fork_server(client)
                    servers[pid] = client
                    selector.register(client, selectors.EVENT_READ, pid)
                elif key.fileobj == ended_r:
                    os.read(ended_r, 4096)
                    for pid, status in ended_children():
                        kill(pid)  # what is left of its processes
                        client = servers.pop(pid)
                        with contextlib.suppress(KeyError):
                            selector.unregister(client)
                        with contextlib.suppress(OSError):
                            client.send(str(status).encode())
                        client.close()
                else:  # the client has ended
                    kill(key.data)
                    selector.unregister(key.fileobj)


def ship_the_environment() -> None:
    """The environment of each process is that of the one that started it, as if spawned."""
    get_preparation_data, prepare = spawn.get_preparation_data, spawn.prepare

    def get_with_environment(name: str) -> dict:
        return get_preparation_data(name) | {"environment": dict(os.environ)}

    def prepare_with_environment(data: dict) -> None:
        set_environment(data.pop("environment"))
        prepare(data)

    spawn.get_preparation_data = get_with_environment
    spawn.prepare = prepare_with_environment


def set_environment(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)


def import_sglang() -> None:
    """What a new process imports before it loads plugins, and models. Not http_server, which holds
    by name what plugins replace, and is imported after them."""
    for module in (
        "entrypoints.engine",
        "managers.data_parallel_controller",
        "managers.detokenizer_manager",
        "managers.scheduler",
        "model_executor.model_runner",
        "models.registry",
    ):
        importlib.import_module(f"sglang.srt.{module}")
    assert "sglang.srt.entrypoints.http_server" not in sys.modules
    from sglang.srt.managers.multimodal_processor import import_processors

    import_processors("sglang.srt.multimodal.processors")


def ended_children() -> Iterator[tuple[int, int]]:
    """Process ids and exit statuses."""
    with contextlib.suppress(ChildProcessError):
        while (child := os.waitpid(-1, os.WNOHANG))[0]:
            yield child[0], os.waitstatus_to_exitcode(child[1])


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def fork_server(client: socket.socket) -> int:
    """Its process id, which is that of its process group as well."""
    request, outputs, _, _ = socket.recv_fds(client, MAX_REQUEST, 2)
    pid = os.fork()
    if pid == 0:
        be_server(json.loads(request), outputs)
    with contextlib.suppress(PermissionError):
        os.setpgid(pid, pid)  # which the child does also, whoever comes first
    for output in outputs:
        os.close(output)
    return pid


def be_server(request: dict, outputs: list[int]) -> NoReturn:
    status = 1
    try:
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for output, standard in zip(outputs, (1, 2), strict=True):
            os.dup2(output, standard)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        set_environment(request["environment"])
        os.chdir(request["directory"])
        paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        # Without the folder of this file.
        sys.path[:] = dict.fromkeys([request["directory"], *paths, *sys.path[1:]])
        start_fork_server()
        sys.argv = [MODULE[1], *request["flags"]]
        runpy.run_module(MODULE[1], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start_fork_server() -> None:
    """multiprocessing's, as a fork of this process instead of a new interpreter."""
    resource_tracker.ensure_running()
    server, spawnv_passfds = os.getpid(), util.spawnv_passfds

    def fork(_executable: str, _arguments: list[str], descriptors: list[int]) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            listener, alive = descriptors
            for descriptor in map(int, os.listdir("/proc/self/fd")):
                if descriptor > 2 and descriptor not in descriptors:
                    with contextlib.suppress(OSError):
                        os.close(descriptor)
            # SGLang's processes tell the one that started them of a crash.
            signal.signal(signal.SIGQUIT, lambda *_: os.kill(server, signal.SIGQUIT))
            # Children of children are started by the same one.
            forkserver._forkserver.ensure_running = resource_tracker.ensure_running
            forkserver.main(listener, alive, preload=None)
        finally:
            os._exit(0)

    util.spawnv_passfds = fork
    try:
        forkserver.ensure_running()
    finally:
        util.spawnv_passfds = spawnv_passfds


if __name__ == "__main__":
    main()
