"""Run a worker against the stand-in: `python -m standin --port 8090 -- python handler.py`."""

import argparse
import errno
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from .process import WorkerProcess
from .server import StandinServer, worker_environment

USAGE_ERROR = 2


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    try:
        server = StandinServer(port=options.port)
    except OSError as error:
        reason = "is already in use" if error.errno == errno.EADDRINUSE else f"cannot be opened: {error}"
        _print(f"Port {options.port} {reason}. Choose another port with --port.")
        return USAGE_ERROR
    with server:
        return _run(server, options.command)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m standin", description=__doc__)
    parser.add_argument("--port", type=int, default=8090, help="port of the stand-in (default: 8090)")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="command that starts the worker, after --")
    return parser.parse_args(arguments)


def _run(server: StandinServer, command: Sequence[str]) -> int:
    try:
        worker = WorkerProcess(command, worker_environment(server.port, server.platform.endpoint))
    except OSError as error:
        _print(f"The worker cannot be started: {error}.")
        return USAGE_ERROR
    with worker:
        _forward_signals(worker)
        ready = server.start(server.platform.until(lambda platform: bool(platform.records.takes)))
        ready.add_done_callback(lambda future: None if future.cancelled() else _print(_instructions(server)))
        code = worker.wait()
        if not ready.done():
            _print(f"The worker ended with exit code {code} before it was ready.")
        return code


def _forward_signals(worker: WorkerProcess) -> None:
    """Forward the first signal to the worker. A second one kills it, because the SDK waits for its running jobs."""
    received: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        worker.send_signal(signal.SIGKILL if received else number)
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)


def _instructions(server: StandinServer) -> str:
    return (
        f"The worker is ready.\n"
        f"  OpenAI clients: base_url={server.openai_base_url} and any API key\n"
        f"  curl -s '{server.endpoint_url}/runsync' -H 'Content-Type: application/json' -d '{{\"input\": {{…}}}}'\n"
        f"  A page to try the model: {server.url}/"
    )


def _print(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
