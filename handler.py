"""RunPod's entry point: settings → weights → engine → the loop that takes jobs.

Heavy modules are imported only once what comes before them has succeeded, so that a mistake is told within a second.
"""

import argparse
import asyncio
import json
import os
import sys

from worker import config, telemetry, weights
from worker.errors import StartupError


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
    """Load the engine, then serve the queue, the SDK's test server, or one local job."""
    from worker import local

    is_local = chosen.test_input is not None or not (chosen.rp_serve_api or settings.runpod_webhook_get_job)
    job = local.read_job(chosen.test_input) if is_local else None
    snapshot = weights.resolve(settings)

    from worker.engine import Engine, parse_arguments
    from worker.service import Service

    engine = Engine.load(parse_arguments(os.environ, settings, snapshot))
    service = Service(engine.attach, settings.allow_control_routes)
    try:
        if job is not None:
            result = asyncio.run(local.run(service.handler, job))
            sys.stdout.write(json.dumps(result, ensure_ascii=False, indent=2) + "\n")
            return 0 if result["status"] == "COMPLETED" else 1
        serve_jobs(service.handler, settings.max_concurrency or engine.concurrency, chosen.rp_serve_api)
        return 0
    finally:
        engine.shutdown()


def serve_jobs(handler: object, concurrency: int, test_server: bool) -> None:
    """Take jobs from RunPod's queue, or from the SDK's test server, until told to stop."""
    import runpod

    if test_server:
        from worker import devapi

        devapi.install()
    runpod.serverless.start(
        {"handler": handler, "return_aggregate_stream": True, "concurrency_modifier": lambda _current: concurrency}
    )


if __name__ == "__main__":
    sys.exit(main())
