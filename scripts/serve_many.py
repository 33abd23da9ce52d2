"""Start N SGLang servers and SGLang's router in front of them; one URL for clients.

    scripts/serve_many.sh MODEL N [--host HOST] [--port PORT] [--start-timeout SECONDS]
    [sglang flags...] scripts/serve_many.sh Qwen/Qwen2.5-VL-7B-Instruct 4 --enable-rotatek

The router listens on HOST:PORT and shows its Prometheus metrics on HOST:PORT+N+1; the servers
listen on 127.0.0.1, ports PORT+1 to PORT+N. The machine's GPUs (those of CUDA_VISIBLE_DEVICES, if
it is set) are dealt evenly: with as many GPUs as servers one each, with twice as many two each, for
--tp 2. Without a GPU all run on the CPU.

The router keeps requests with the same X-SMG-Routing-Key header on one server
(scripts/common/routing.py makes the header), and gives a new key to a server with the fewest keys
in flight. Without the header each request goes to a random server, so a later turn finds its images
cached in one of N cases.

Ctrl-C or SIGTERM ends all of them. If a server dies, the others take its chats; the exit code is 1
when the router or the last server has died.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import requests

sys.path.insert(0, str(Path(__file__).resolve().parent / "common"))

from server_process import ChildServer, ServerError, ServerProcess

LOGS = Path(__file__).resolve().parents[1] / ".cache" / "logs"
WATCH_SECONDS = 1.0


def parse_arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of this program, and the flags for every server."""
    parser = argparse.ArgumentParser(
        prog="scripts/serve_many.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # Else --po would be taken for --port, and flags of SGLang that begin like ours for ours.
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a model directory, or a name on the hub")
    parser.add_argument("servers", metavar="N", type=int, help="how many servers")
    parser.add_argument("--host", default="127.0.0.1", help="of the router (default %(default)s)")
    parser.add_argument(
        "--port", type=int, default=30000, help="of the router (default %(default)s)"
    )
    parser.add_argument(
        "--start-timeout", type=float, default=1800, help="seconds (default %(default)s)"
    )
    arguments, server_flags = parser.parse_known_args(argv)
    if arguments.servers < 1:
        parser.error(f"N is {arguments.servers}, expected at least 1 server")
    last = arguments.port + arguments.servers + 1
    if not 1 <= arguments.port < last <= 65535:
        parser.error(
            f"--port {arguments.port} needs the ports {arguments.port} to {last}, expected them "
            "within 1 to 65535"
        )
    return arguments, server_flags


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, else the index of each GPU of this machine; empty without a
    driver."""
    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return [device.strip() for device in named.split(",")]
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
        count = sum(line.startswith("GPU ") for line in listed.splitlines())
    else:
        count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return [str(index) for index in range(count)]


def deal_gpus(gpus: list[str], servers: int) -> list[dict[str, str]]:
    """The environment of each server: as many neighbouring GPUs for each, or nothing on a machine
    without GPUs. ServerError when there are fewer GPUs than servers."""
    if not gpus:
        return [{} for _ in range(servers)]
    each = len(gpus) // servers
    if not each:
        raise ServerError(
            f"{servers} servers need a GPU each, found {len(gpus)} ({', '.join(gpus)}); start "
            f"{len(gpus)} servers at most"
        )
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each : (i + 1) * each])} for i in range(servers)
    ]


def check_ports(host: str, ports: range) -> None:
    """ServerError for a port that something else listens on."""
    for port in ports:
        with socket.socket() as listener:
            # As servers do: the closed connections of an earlier run do not count.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
            except OSError as error:
                raise ServerError(
                    f"port {port} of {host} is not free ({error.strerror}); {ports[0]} to "
                    f"{ports[-1]} must be: stop what listens there, or choose another --port"
                ) from error


def make_servers(arguments: argparse.Namespace, server_flags: list[str]) -> list[ServerProcess]:
    environments = deal_gpus(visible_gpus(), arguments.servers)
    return [
        ServerProcess(
            arguments.model,
            arguments.port + number,
            server_flags,
            LOGS / f"serve-many-{arguments.port}-server-{number}.log",
            env=environment,
            timeout_seconds=arguments.start_timeout,
        )
        for number, environment in enumerate(environments, 1)
    ]


def make_router(arguments: argparse.Namespace, worker_urls: list[str]) -> ChildServer:
    command = [
        *(sys.executable, "-m", "sglang_router.launch_router"),
        *("--host", arguments.host, "--port", str(arguments.port)),
        *(
            "--prometheus-host",
            arguments.host,
            "--prometheus-port",
            str(arguments.port + arguments.servers + 1),
        ),
        # The default policy compares the text of prompts, and chats about other pictures often
        # begin alike.
        *("--policy", "manual", "--assignment-mode", "min_group"),
        *("--worker-urls", *worker_urls),
    ]
    log_path = LOGS / f"serve-many-{arguments.port}-router.log"
    return ChildServer(
        command, arguments.port, log_path, timeout_seconds=300, health_path="/readiness"
    )


def forget(router_url: str, server_url: str) -> None:
    """Take a server out of the router, which by itself would send it requests for minutes more.
    OSError when the router does not answer."""
    listing = requests.get(f"{router_url}/workers", timeout=10)
    listing.raise_for_status()
    for worker in listing.json()["workers"]:
        if worker["url"] == server_url:
            done = requests.delete(f"{router_url}/workers/{worker['id']}", timeout=10)
            done.raise_for_status()


def watch(router: ChildServer, servers: list[ServerProcess]) -> None:
    """Never return: ServerError when the router or the last server has died."""
    alive = list(servers)
    while True:
        time.sleep(WATCH_SECONDS)
        if not router.is_alive():
            raise ServerError(
                f"the router died; the end of {router.log_path}:\n{router.log_tail()}"
            )
        for server in [server for server in alive if not server.is_alive()]:
            alive.remove(server)
            report = (
                f"the server at {server.url} died; the end of {server.log_path}:\n"
                f"{server.log_tail()}"
            )
            if not alive:
                raise ServerError(f"no server is left: {report}")
            forget(router.url, server.url)
            print(f"error: {report}\nthe other {len(alive)} go on", file=sys.stderr, flush=True)


def serve(arguments: argparse.Namespace, server_flags: list[str]) -> None:
    ports = range(arguments.port, arguments.port + arguments.servers + 2)
    check_ports(arguments.host, ports)
    servers = make_servers(arguments, server_flags)
    router = make_router(arguments, [server.url for server in servers])
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)
            server.launch()
            print(f"starting {server.url} (log: {server.log_path})", flush=True)
        for server in servers:
            server.wait_until_healthy()
        stack.callback(router.stop)
        router.start()
        print(
            f"ready: {arguments.servers} servers behind http://{arguments.host}:{arguments.port}",
            flush=True,
        )
        watch(router, servers)


def main() -> None:
    arguments, server_flags = parse_arguments()
    if importlib.util.find_spec("sglang_router") is None:
        sys.exit(
            f"error: sglang-router is not installed; install it: {sys.executable} -m pip install "
            "-e '.[router]'"
        )
    # Turned into an exception, so that the servers are killed on the way out.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        serve(arguments, server_flags)
    except (ServerError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
