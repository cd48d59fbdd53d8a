"""Runs one schedule: the real job loop, delivery, pipeline and handler, on a virtual clock."""

import asyncio
import random
from contextlib import suppress

from prometheus_client import CollectorRegistry

from tests.simulation.engine import Engine
from tests.simulation.history import History
from tests.simulation.plan import Plan, plan_of
from tests.simulation.platform import SimulatedPlatform
from tests.support.clock import VirtualLoop
from tests.support.urls import URLS
from worker import race
from worker.errors import EngineDiedError
from worker.lifecycle import Lifecycle
from worker.queue.handler import JobHandler
from worker.queue.loop import Context, JobLoop
from worker.queue.places import Places
from worker.queue.platform import Platform
from worker.request.pipeline import Pipeline
from worker.settings import Settings
from worker.telemetry.jobs import Telemetry

END_SECONDS = 60.0
"""How long after a stop, beyond its grace, a worker must have ended."""

TELEMETRY = Telemetry("simulated", CollectorRegistry())


def run(seed: int) -> list[str]:
    """Run the schedule of a seed and return the violations of the invariants. The same seed gives the same schedule."""
    # The pauses between attempts have a random part.
    random.seed(seed)
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, VirtualLoop)
        return runner.run(_run(plan_of(seed), loop))


def first_violation(seed: int) -> str | None:
    """Run the schedule of a seed, and return its first violation and how to replay it; None without one."""
    if not (violations := run(seed)):
        return None
    return f"Seed {seed}: {violations[0]}. Replay it: python -m tests.simulation --replay {seed}"


async def _run(plan: Plan, loop: VirtualLoop) -> list[str]:
    settings = Settings.model_validate(plan.settings)
    lifecycle, engine = Lifecycle(), Engine(plan)
    pipeline = Pipeline(settings, lifecycle, TELEMETRY)
    most = settings.concurrency(plan.capacity)
    history = History(plan, engine, most, pipeline.memory.room, lifecycle.stopping)
    network = SimulatedPlatform(plan, history)
    platform = Platform(network, URLS, lifecycle.stopping, settings.delivery_timeout)
    places = Places(most, settings.job_batch_size, engine.load, pipeline.memory.room, engine.reported)
    context = Context(lifecycle, settings, engine.died, places, lambda: None)
    handler = history.handler(JobHandler(engine.app, pipeline, settings).handle)
    lifecycle.ready(lambda: engine.is_dead)

    loop.set_exception_handler(lambda _, context: history.violated(f"{context['message']}: {context.get('exception')}"))

    def freeze(seconds: float) -> None:
        if not lifecycle.stopping.is_set():
            loop.jump(seconds)
            network.reset()

    def stop() -> None:
        history.stops()
        lifecycle.stopping.set()

    for at in plan.resets:
        loop.call_at(at, network.reset)
    for at, seconds in plan.freezes:
        loop.call_at(at, freeze, seconds)
    if plan.stopped_at is not None:
        loop.call_at(plan.stopped_at, stop)
    if plan.dies_at is not None:
        loop.call_at(plan.dies_at, engine.die)

    working = asyncio.ensure_future(JobLoop(handler, platform, history, context).run())
    try:
        async with asyncio.timeout(plan.horizon):
            await race.first(working, _settled(history, network))
    except TimeoutError:
        history.violated(f"jobs have no end: {sorted(history.active)}")
    stop()
    await asyncio.wait([working], timeout=settings.grace + END_SECONDS)
    if working.done():
        with suppress(EngineDiedError):
            working.result()
    else:
        history.violated("the worker does not end")
        await race.end(working)
    history.check()
    await asyncio.sleep(END_SECONDS)
    _check_nothing_is_left(history, engine, pipeline)
    return history.violations


async def _settled(history: History, network: SimulatedPlatform) -> None:
    while history.active or not network.is_settled:
        history.changed.clear()
        await history.changed.wait()


def _check_nothing_is_left(history: History, engine: Engine, pipeline: Pipeline) -> None:
    if tasks := asyncio.all_tasks() - {asyncio.current_task()}:
        history.violated(f"tasks are left: {sorted(str(task.get_coro()) for task in tasks)}")
    if engine.collisions:
        history.violated("a job had two requests in the engine")
    if engine.requests:
        history.violated(f"requests are left in the engine: {engine.requests}")
    if pipeline.memory.held:
        history.violated(f"{pipeline.memory.held} bytes of memory are still reserved")
    if history.active or TELEMETRY.running:
        history.violated(f"jobs are left: {sorted(history.active)}, {TELEMETRY.running} records")
    TELEMETRY.running = 0
