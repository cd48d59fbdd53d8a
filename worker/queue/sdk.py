"""Starts the RunPod SDK's worker. Importing the SDK takes a second, so import this module only when it is needed."""

import runpod
from runpod.serverless.modules import rp_fastapi, rp_logger

from worker.queue import loop
from worker.queue.development_api import DevelopmentAPI
from worker.queue.handler import Handler
from worker.telemetry import logs


def serve_queue(handler: Handler, concurrency: int, context: loop.Context) -> None:
    """Answer jobs from RunPod's queue, `concurrency` at once, until the worker is stopped or cannot go on."""
    loop.install(context)
    start(handler, concurrency)


def serve_development_api(handler: Handler) -> None:
    """Run the SDK's test server on the port that the SDK's own command line options choose."""
    rp_fastapi.WorkerAPI = DevelopmentAPI
    start(handler, 1)


def start(handler: Handler, concurrency: int) -> None:
    """Run the SDK's worker as it is, or as it was changed before, until it ends."""
    rp_logger.RunPodLogger.log = logs.log_for_sdk
    runpod.serverless.start(
        {
            "handler": handler,
            "return_aggregate_stream": True,
            # A value that changes would make the SDK wait until no job runs.
            "concurrency_modifier": lambda _current: concurrency,
        }
    )
