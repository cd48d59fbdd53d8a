"""RunPod's entry point: settings → weights → engine → the loop that takes jobs.

Heavy modules are imported only once what comes before them has succeeded, so that a mistake is told within a second.
"""

import argparse
import asyncio
import json
import os
import sys
from typing import TYPE_CHECKING

import uvloop

from worker import config, local, telemetry, weights
from worker.errors import StartupError
from worker.service import Job, Service

if TYPE_CHECKING:
    from worker.engine import Engine


def main() -> int:
    """Run the worker until the platform stops it, or one local job; return the exit code."""
    os.environ.update(config.library_defaults(os.environ))
    try:
        settings = config.load(os.environ)
        telemetry.configure(settings.log_level)
        return run(settings, options(sys.argv[1:]))
    except StartupError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


def options(argv: list[str]) -> argparse.Namespace:
    """Read those of the SDK's options that decide what runs; the SDK reads them, and its others, again."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--test_input")
    parser.add_argument("--rp_serve_api", action="store_true")
    known, _ = parser.parse_known_args(argv)
    return known


def run(settings: config.Settings, chosen: argparse.Namespace) -> int:
    """Load the engine, then answer one local job, or serve the queue or the SDK's test server."""
    serves = chosen.rp_serve_api or settings.runpod_webhook_get_job is not None
    job = local.read_job(chosen.test_input) if chosen.test_input is not None or not serves else None
    snapshot = weights.resolve(settings)

    from worker.engine import Engine, parse_arguments

    engine = Engine.load(parse_arguments(os.environ, settings, snapshot))
    try:
        if job is not None:
            return asyncio.run(answer(engine, Service(engine.attach, settings), job))
        serve(engine, settings, chosen.rp_serve_api)
        return 0
    finally:
        engine.shutdown()


async def answer(engine: "Engine", service: Service, job: Job) -> int:
    """Run one job and print its result."""
    await engine.attach()
    result = await local.run(service.handler, job)
    sys.stdout.write(json.dumps(result, ensure_ascii=False, indent=2) + "\n")
    return 0 if result["status"] == "COMPLETED" else 1


def serve(engine: "Engine", settings: config.Settings, test_server: bool) -> None:
    """Take jobs from RunPod's queue, or from the SDK's test server, until told to stop."""
    import runpod

    from worker import devapi, queue

    service = Service(engine.attach, settings)
    concurrency = settings.max_concurrency or engine.concurrency
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if test_server:
            devapi.install()
        elif settings.worker_job_loop == "event":
            # The loop that serves is the one that attaches: before the first ping and the first request for jobs.
            runner.run(engine.attach())
            queue.install(runner, engine.died)
        runpod.serverless.start(
            {
                "handler": service.handler,
                "return_aggregate_stream": True,
                "concurrency_modifier": lambda _current: concurrency,
            }
        )


if __name__ == "__main__":
    sys.exit(main())
