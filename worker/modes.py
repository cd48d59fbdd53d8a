"""The ways in which a worker answers: one local job, over HTTP, from the queue; or nobody, telling each why."""

import asyncio
import json
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

from worker import processes as program
from worker.errors import ENGINE_DIED, LEAVING, EngineDiedError, StartFailedError
from worker.http.gate import Gate
from worker.http.server import HttpServer
from worker.queue import local
from worker.queue.handler import Handler, Job
from worker.refusal import Refusal
from worker.worker import Worker

REFUSED_AT_ONCE = 16
"""Jobs that a worker which cannot start takes at once."""

StartSdk = Callable[[Handler, int], None]
"""Runs the SDK's worker with a handler that takes so many jobs at once, until it ends."""


async def answer(worker: Worker, job: Job) -> int:
    """Run one job and print its result."""
    await worker.attach()
    result = await local.run(worker.service().handler, job)
    sys.stdout.write(json.dumps(result, ensure_ascii=False, indent=2) + "\n")
    return 0 if result["status"] == "COMPLETED" else 1


def serve_http(worker: Worker, server: HttpServer, gate: Gate) -> None:
    """Let requests through to the engine until told to stop."""
    told = told_to_stop(server)

    async def serve() -> None:
        attaching = asyncio.create_task(worker.attach())
        await first_of(told.wait(), asyncio.wait({attaching}))
        if not attaching.done():
            attaching.cancel()
            return
        gate.open(attaching.result(), worker.concurrency)
        await first_of(told.wait(), worker.engine.died())
        if worker.engine.is_dead:
            gate.end(ENGINE_DIED)
            await gate.drained(program.LAST_WORDS_SECONDS)
            raise EngineDiedError
        worker.status.drain()
        await gate.drained(worker.settings.grace)
        gate.end(LEAVING)
        await gate.drained(program.LAST_WORDS_SECONDS)

    with program.leaving_soon():
        server.run(serve())


def refuse_http(server: HttpServer, refusal: Refusal) -> None:
    """Have the gate tell why there is no engine, until told to stop or for long enough."""
    server.run(first_of(told_to_stop(server).wait(), refusal.given_up()))


def told_to_stop(server: HttpServer) -> asyncio.Event:
    """Return what is set in the server's loop when the platform stops the worker."""
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.notify(told))
    return told


async def first_of(*works: Coroutine[Any, Any, object]) -> None:
    """Wait until one of them ends; what it raises is raised."""
    tasks = [asyncio.create_task(work) for work in works]
    ended, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for other in others:
        other.cancel()
    for one in ended:
        one.result()


def serve_queue(worker: Worker, start_sdk: StartSdk, test_server: bool) -> None:
    """Take jobs from RunPod's queue, or from the SDK's test server, until told to stop."""
    from worker.queue import development_api as devapi
    from worker.queue import loop as queue

    service = worker.service()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if test_server:
            devapi.install()
        elif worker.settings.worker_job_loop == "event":
            # The loop that serves is the one that attaches: before the first ping and the first request for jobs.
            runner.run(worker.attach())
            surroundings = queue.Surroundings(
                died=worker.engine.died,
                is_dead=lambda: worker.engine.is_dead,
                end=service.end,
                draining=worker.status.drain,
                posted=worker.telemetry.stream_posts.inc,
                grace=worker.settings.grace,
                leaves_jobs=worker.settings.on_engine_death == "retry",
            )
            queue.install(runner, surroundings)
        with program.leaving_soon():
            start_sdk(service.handler, worker.concurrency)


def refuse_queue(worker: Worker, start_sdk: StartSdk, refusal: Refusal) -> None:
    """Take jobs and fail each with the reason, until told to stop or for long enough."""
    from worker.queue import loop as queue

    service = worker.service()
    service.end(StartFailedError(refusal.why))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        surroundings = queue.Surroundings(
            died=refusal.given_up,
            is_dead=lambda: False,
            end=lambda _: None,
            draining=worker.status.drain,
            posted=worker.telemetry.stream_posts.inc,
            grace=worker.settings.grace,
        )
        queue.install(runner, surroundings)
        start_sdk(refusal.counted(service.handler), REFUSED_AT_ONCE)
