"""RunPod's entry point: settings → weights → engine → the queue, an HTTP server, or one local job.

Heavy modules are imported only once what comes before them has succeeded, so that a mistake is told within a second.
"""

import argparse
import asyncio
import json
import logging.config
import os
import signal
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from typing import IO

import uvloop

from worker import check, config, local, logs, sources
from worker.assembly import Worker
from worker.errors import EngineDiedError, StartupError
from worker.listener import HttpServer
from worker.server import Gate
from worker.service import Job, Service


def main() -> int:
    """Run the worker until the platform stops it, or one local job, or check its settings; return the exit code."""
    chosen = options(sys.argv[1:])
    if chosen.check:
        os.environ.update(config.library_defaults(os.environ))
        return check.run(os.environ, chosen.json)
    try:
        said = sources.gather(os.environ)
        os.environ.update(config.library_defaults(said.values))
        settings = config.load(said.values, said.told)
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            configure_logs(settings, file)
            for warning in said.warnings:
                logging.getLogger("worker").warning(warning)
            return run(Worker(settings, said), chosen)
    except StartupError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


def options(argv: list[str]) -> argparse.Namespace:
    """Read our options, and those of the SDK's that decide what runs; the SDK reads its own again."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--test_input")
    parser.add_argument("--rp_serve_api", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", action="store_true")
    known, _ = parser.parse_known_args(argv)
    return known


def configure_logs(settings: config.Settings, file: IO[str]) -> None:
    """Have this process, and by way of a file vLLM in all of its processes, log in one form."""
    lines = logs.configuration(
        settings.log_format, settings.log_level, settings.vllm_logging_level, settings.log_prompts
    )
    logging.config.dictConfig(lines)
    logging.captureWarnings(capture=True)
    json.dump(lines, file)
    file.flush()
    os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", file.name)
    if settings.log_prompts:
        logging.getLogger("worker").warning("LOG_PROMPTS is set: what users say and are told is written to this log")


def run(worker: Worker, chosen: argparse.Namespace) -> int:
    """Load the engine, then answer one local job, or serve the queue, HTTP or the SDK's test server."""
    settings = worker.settings
    mode = "local" if chosen.test_input is not None else "test server" if chosen.rp_serve_api else settings.mode
    job = local.read_job(chosen.test_input) if mode == "local" else None
    with ExitStack() as stack:
        ports = [port for port in (settings.port_health, settings.metrics_port) if port is not None]
        gate = Gate(worker.monitor, worker.status, worker.telemetry, settings, offers_engine=mode == "http")
        if mode == "http":
            ports.insert(0, settings.http_port)
        server = stack.enter_context(HttpServer(gate, ports)) if ports else None
        stack.callback(worker.shutdown)
        serves_queue = job is None and mode != "http"
        worker.load(meanwhile=partial(import_module, "worker.queue") if serves_queue else lambda: None)
        if job is not None:
            return asyncio.run(answer(worker, job))
        if mode == "http" and server is not None:
            serve_http(worker, server, gate)
        else:
            serve_queue(worker, test_server=mode == "test server")
    return 0


async def answer(worker: Worker, job: Job) -> int:
    """Run one job and print its result."""
    await worker.attach()
    result = await local.run(Service(worker.attach, worker.settings, worker.telemetry).handler, job)
    sys.stdout.write(json.dumps(result, ensure_ascii=False, indent=2) + "\n")
    return 0 if result["status"] == "COMPLETED" else 1


def serve_http(worker: Worker, server: HttpServer, gate: Gate) -> None:
    """Let requests through to the engine until told to stop."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.notify(stopped))

    async def serve() -> None:
        gate.open(await worker.attach(), worker.concurrency)
        ends = [asyncio.create_task(stopped.wait()), asyncio.create_task(worker.engine.died())]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        if worker.engine.is_dead:
            raise EngineDiedError("The engine has died; the worker leaves, so that it is replaced.")
        worker.status.drain()
        await gate.drained()

    server.run(serve())


def serve_queue(worker: Worker, test_server: bool) -> None:
    """Take jobs from RunPod's queue, or from the SDK's test server, until told to stop."""
    import runpod
    from runpod.serverless.modules import rp_logger

    from worker import devapi, queue

    rp_logger.RunPodLogger.log = logs.log_for_sdk
    service = Service(worker.attach, worker.settings, worker.telemetry)
    concurrency = worker.concurrency
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if test_server:
            devapi.install()
        elif worker.settings.worker_job_loop == "event":
            # The loop that serves is the one that attaches: before the first ping and the first request for jobs.
            runner.run(worker.attach())
            queue.install(runner, worker.engine.died, worker.telemetry.stream_posts.inc, worker.status.drain)
        runpod.serverless.start(
            {
                "handler": service.handler,
                "return_aggregate_stream": True,
                "concurrency_modifier": lambda _current: concurrency,
            }
        )


if __name__ == "__main__":
    sys.exit(main())
