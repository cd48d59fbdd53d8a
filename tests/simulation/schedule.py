"""Runs one schedule: the real job loop, delivery, pipeline, handler and batches, on a virtual clock."""

import asyncio
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prometheus_client import CollectorRegistry

from tests.simulation.engine import Engine
from tests.simulation.history import History
from tests.simulation.lines import Lines
from tests.simulation.plan import Plan, plan_of
from tests.simulation.platform import SimulatedPlatform
from tests.support.batches import InlineExecutor
from tests.support.clock import VirtualLoop
from tests.support.urls import URLS
from worker import race
from worker.batch import spec
from worker.batch.job import Batch, Shared
from worker.batch.share import Share, without_lines
from worker.errors import EngineDiedError
from worker.lifecycle import Lifecycle
from worker.media.fetch import Policy
from worker.queue.batch_jobs import BatchJobs
from worker.queue.handler import JobHandler
from worker.queue.loop import Context, JobLoop
from worker.queue.places import Places
from worker.queue.platform import Platform
from worker.request.pipeline import Pipeline
from worker.settings import Settings
from worker.telemetry.jobs import Telemetry
from worker.telemetry.usage import EngineLoad

END_SECONDS = 60.0
"""How long after a stop, beyond its grace, a worker must have ended."""


TELEMETRY = Telemetry("simulated", CollectorRegistry(), lambda: asyncio.get_running_loop().time())


class _Worker:
    """The parts of a worker around a simulated engine."""

    def __init__(self, plan: Plan, settings: Settings, lines: Lines) -> None:
        self.settings = settings
        self.lifecycle, self.engine = Lifecycle(), Engine(plan, lines)
        self.pipeline = Pipeline(settings, self.lifecycle, TELEMETRY)
        share = Share(TELEMETRY, self.pipeline.memory, self.engine.load, settings.max_concurrency)
        self.shared = Shared(self.engine.app, self.pipeline, settings, Policy(), share, threads=InlineExecutor)
        self.handler = JobHandler(self.engine.app, self.pipeline, settings, batches=BatchJobs(self.shared))
        self.lifecycle.ready(lambda: self.engine.is_dead)

    def callers_load(self) -> EngineLoad:
        return without_lines(self.engine.load(), TELEMETRY.lines_in_engine)


def run(seed: int) -> list[str]:
    """Run the schedule of a seed and return the violations of the invariants. The same seed gives the same schedule."""
    # The pauses between attempts have a random part.
    random.seed(seed)
    # To create it for each schedule would take longer than the schedule.
    TELEMETRY.running, TELEMETRY._last_caller = 0, float("-inf")
    TELEMETRY._lines.clear()
    plan = plan_of(seed)
    with _folder(plan) as folder, asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(_run(plan, folder))


@contextmanager
def _folder(plan: Plan) -> Iterator[Path]:
    """Return a folder for all files of a schedule, in memory where there is such a file system."""
    if not plan.batches:
        yield Path()
        return
    memory, before = Path("/dev/shm"), tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="simulation-", dir=memory if memory.is_dir() else None) as folder:
        tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = before


def first_violation(seed: int) -> str | None:
    """Run the schedule of a seed, and return its first violation and how to replay it; None without one."""
    if not (violations := run(seed)):
        return None
    return f"Seed {seed}: {violations[0]}. Replay it: python -m tests.simulation --replay {seed}"


async def _run(plan: Plan, folder: Path) -> list[str]:
    lines = Lines(plan, folder)
    settings = Settings.model_validate({**plan.settings, "base_path": str(lines.volume)})
    worker = _Worker(plan, settings, lines)
    most = settings.concurrency(plan.capacity)
    history = History(plan, worker.engine, most, worker.pipeline, lambda: TELEMETRY.lines_in_engine)
    network = SimulatedPlatform(plan, history)
    _plan_faults(plan, worker, history, network)

    lifecycle = worker.lifecycle
    platform = Platform(network, URLS, lifecycle.stopping, settings.delivery_timeout, lifecycle.resumes)
    places = Places(
        most, settings.job_batch_size, worker.callers_load, worker.pipeline.memory.room, worker.engine.reported
    )
    context = Context(worker.lifecycle, settings, worker.engine.died, places, lambda: None)
    loop = JobLoop(history.handler(worker.handler.handle), platform, history, context)
    working = asyncio.ensure_future(loop.run())
    try:
        async with asyncio.timeout(plan.horizon):
            await race.first(working, _settled(history, network))
    except TimeoutError:
        history.violated(f"jobs have no end: {sorted(history.active)}")
    history.stops()
    await asyncio.wait([working], timeout=settings.grace + END_SECONDS)
    if working.done():
        with suppress(EngineDiedError):
            working.result()
    else:
        history.violated("the worker does not end")
        await race.end(working)
    history.check()
    await asyncio.sleep(END_SECONDS)
    _check_nothing_is_left(history, worker)
    if plan.has_volume:
        await _check_next_worker(history, _Worker(plan, settings, lines))
    return lines.violations


def _plan_faults(plan: Plan, worker: _Worker, history: History, network: SimulatedPlatform) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.set_exception_handler(lambda _, context: history.violated(f"{context['message']}: {context.get('exception')}"))

    def freeze(seconds: float) -> None:
        if not worker.lifecycle.stopping.is_set():
            loop.jump(seconds)
            worker.lifecycle.resumes.resumed(seconds)
            network.reset()

    for at in plan.resets:
        loop.call_at(at, network.reset)
    for at, seconds in plan.freezes:
        loop.call_at(at, freeze, seconds)
    if plan.stopped_at is not None:
        loop.call_at(plan.stopped_at, history.stops)
    if plan.dies_at is not None:
        loop.call_at(plan.dies_at, worker.engine.die)


async def _check_next_worker(history: History, worker: _Worker) -> None:
    """Have another worker go on with every batch that began, however it ended. Its output must be complete then."""
    for job_id, batch in history.begun_batches.items():
        result = await Batch(job_id, spec.read(batch.input), worker.shared).run()
        worker.engine.lines.check_result(batch, result)
    worker.engine.lines.check_files()
    _check_nothing_is_left(history, worker)


async def _settled(history: History, network: SimulatedPlatform) -> None:
    while history.active or not network.is_settled:
        history.changed.clear()
        await history.changed.wait()


def _check_nothing_is_left(history: History, worker: _Worker) -> None:
    if tasks := asyncio.all_tasks() - {asyncio.current_task()}:
        history.violated(f"tasks are left: {sorted(str(task.get_coro()) for task in tasks)}")
    if worker.engine.collisions:
        history.violated("a job had two requests in the engine")
    if worker.engine.requests:
        history.violated(f"requests are left in the engine: {worker.engine.requests}")
    if worker.pipeline.memory.held:
        history.violated(f"{worker.pipeline.memory.held} bytes of memory are still reserved")
    if history.active or TELEMETRY.running:
        history.violated(f"jobs are left: {sorted(history.active)}, {TELEMETRY.running} records")
    if TELEMETRY.batches.current:
        history.violated("a batch is still shown as running")
