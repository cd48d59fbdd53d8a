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
from pathlib import Path

from worker import check, modes
from worker import processes as program
from worker.errors import ConfigurationError, StartupError
from worker.http.gate import Gate
from worker.http.server import HttpServer
from worker.queue import local
from worker.queue.handler import Handler
from worker.refusal import Refusal
from worker.settings import settings as config
from worker.settings import sources
from worker.telemetry import logs
from worker.worker import Worker

CAUSE = "cause.txt"


def main() -> int:
    """Run the worker until the platform stops it, or one local job, or check its settings; return the exit code."""
    chosen = options(sys.argv[1:])
    program.adopt_orphans()
    if chosen.check:
        os.environ.update(config.library_defaults(os.environ))
        return check.run(os.environ, chosen.json)
    try:
        with tempfile.TemporaryDirectory(prefix="worker-") as folder:
            return start(chosen, Path(folder))
    except StartupError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        program.end_all()


def start(chosen: argparse.Namespace, folder: Path) -> int:
    """Read the settings and run; what is wrong with them is told like everything else that stands in the way."""
    wrong = None
    try:
        said = sources.gather(os.environ)
        os.environ.update(config.library_defaults(said.values))
        settings = config.load(said.values, said.told)
    except ConfigurationError as error:
        said, wrong = sources.Sources(config.bare(os.environ), {}), error
        try:
            settings = config.load(said.values)
        except ConfigurationError:
            raise error from None
    configure_logs(settings, folder)
    for warning in said.warnings:
        logging.getLogger("worker").warning(warning)
    return run(Worker(settings, said, folder / CAUSE), chosen, wrong)


def options(argv: list[str]) -> argparse.Namespace:
    """Read our options, and those of the SDK's that decide what runs; the SDK reads its own again."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--test_input")
    parser.add_argument("--rp_serve_api", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", action="store_true")
    known, _ = parser.parse_known_args(argv)
    return known


def configure_logs(settings: config.Settings, folder: Path) -> None:
    """Have this process, and by way of a file vLLM in all of its processes, log in one form."""
    form = (settings.log_format, settings.log_level, settings.vllm_logging_level, settings.log_prompts)
    logging.config.dictConfig(logs.configuration(*form))
    logging.captureWarnings(capture=True)
    file = folder / "logging.json"
    file.write_text(json.dumps(logs.configuration(*form, cause=folder / CAUSE)))
    os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(file))
    if settings.log_prompts:
        logging.getLogger("worker").warning("LOG_PROMPTS is set: what users say and are told is written to this log")


def run(worker: Worker, chosen: argparse.Namespace, wrong: ConfigurationError | None) -> int:
    """Load the engine, then answer one local job, or serve the queue, HTTP or the SDK's test server."""
    settings = worker.settings
    mode = "local" if chosen.test_input is not None else "test server" if chosen.rp_serve_api else settings.mode
    for number in (signal.SIGTERM, signal.SIGINT):
        # While the model is loaded; what serves has its own way to leave.
        signal.signal(number, lambda number, _: sys.exit(0 if mode in ("queue", "http") else 128 + number))
    with ExitStack() as stack:
        ports = [port for port in (settings.port_health, settings.metrics_port) if port is not None]
        gate = Gate(worker.monitor, worker.status, worker.telemetry, settings, offers_engine=mode == "http")
        if mode == "http":
            ports.insert(0, settings.http_port)
        server = None
        try:
            server = stack.enter_context(HttpServer(gate, ports)) if ports else None
        except ConfigurationError as error:
            if mode == "http":
                raise
            wrong = wrong or error
        stack.callback(worker.shutdown)
        try:
            if wrong is not None:
                raise wrong
            job = local.read_job(chosen.test_input) if mode == "local" else None
            serves_queue = job is None and mode != "http"
            worker.load(meanwhile=partial(import_module, "worker.queue") if serves_queue else lambda: None)
            if job is not None:
                return asyncio.run(modes.answer(worker, job))
            if mode == "http" and server is not None:
                modes.serve_http(worker, server, gate)
            else:
                modes.serve_queue(worker, start_sdk, test_server=mode == "test server")
        except ConfigurationError as error:
            if mode not in ("queue", "http") or settings.startup_failure == "exit":
                raise
            worker.shutdown()
            worker.status.fail(str(error))
            logging.getLogger("worker").error("This worker cannot start, and tells its callers why: %s", error)
            if mode == "http" and server is not None:
                modes.refuse_http(server, Refusal(error))
            else:
                modes.refuse_queue(worker, start_sdk, Refusal(error))
    return 0


def start_sdk(handler: Handler, concurrency: int) -> None:
    """Run the SDK's worker until it ends."""
    import runpod
    from runpod.serverless.modules import rp_logger

    rp_logger.RunPodLogger.log = logs.log_for_sdk
    runpod.serverless.start(
        {
            "handler": handler,
            "return_aggregate_stream": True,
            "concurrency_modifier": lambda _current: concurrency,
        }
    )


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads that wait for something that never comes are not waited for.
    os._exit(code)
