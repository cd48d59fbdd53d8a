"""Run workers against the stand-in: `python -m standin --port 8090 -- python handler.py`."""

import argparse
import errno
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
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
        return _run(server, options.command, options.workers)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m standin", description=__doc__)
    parser.add_argument("--port", type=int, default=8090, help="port of the stand-in (default: 8090)")
    parser.add_argument("--workers", type=int, default=1, help="number of workers on the queue (default: 1)")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="command that starts a worker, after --")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers {options.workers} is too small. Start at least 1 worker.")
    return options


def _run(server: StandinServer, command: Sequence[str], count: int) -> int:
    """Run the workers until all have ended. Return the exit code of the first one that failed, or 0."""
    names = [f"worker-{number}" for number in range(1, count + 1)]
    environments = [worker_environment(server.port, server.platform.endpoint, name) for name in names]
    with ThreadPoolExecutor(count) as pool, ExitStack() as stack:
        try:
            workers = [stack.enter_context(WorkerProcess(command, environment)) for environment in environments]
        except OSError as error:
            _print(f"The worker cannot be started: {error}.")
            return USAGE_ERROR
        _forward_signals(workers)
        ready = server.start(server.platform.until(lambda platform: len(platform.ready_workers()) >= count))
        ready.add_done_callback(lambda future: None if future.cancelled() else _print(_instructions(server, count)))
        ends = {pool.submit(worker.wait): name for worker, name in zip(workers, names, strict=True)}
        codes: list[int] = []
        for end in as_completed(ends):
            codes.append(end.result())
            if count > 1:
                _print(f"{ends[end]} ended with exit code {codes[-1]}.")
            elif not ready.done():
                _print(f"The worker ended with exit code {codes[-1]} before it was ready.")
        return next(filter(None, codes), 0)


def _forward_signals(workers: Sequence[WorkerProcess]) -> None:
    """Forward the first signal to the workers. A second one kills them, because the SDK waits for its running jobs."""
    received: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        for worker in workers:
            worker.send_signal(signal.SIGKILL if received else number)
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)


def _instructions(server: StandinServer, count: int) -> str:
    subject = "The worker is" if count == 1 else f"All {count} workers are"
    return (
        f"{subject} ready.\n"
        f"  OpenAI clients: base_url={server.openai_base_url} and any API key\n"
        f"  curl -s '{server.endpoint_url}/runsync' -H 'Content-Type: application/json' -d '{{\"input\": {{…}}}}'\n"
        f"  A page to try the model: {server.url}/"
    )


def _print(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
