"""Takes jobs from RunPod's queue while others run, starts them as they arrive, and cancels those that are stopped.

It replaces the loop of the SDK, which polls its own queue every 100 ms, sleeps for 1 s when it thinks that it is full,
and counts a queued job twice.
"""

import asyncio
import functools
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from worker import race
from worker.batch.spec import is_batch
from worker.errors import JobError, StartupError
from worker.lifecycle import ERROR_SECONDS, Lifecycle
from worker.queue.delivery import Delivery, StoreResult, store_nothing
from worker.queue.handler import Handler, Job
from worker.queue.outputs import Left, Progress
from worker.queue.places import Places
from worker.queue.platform import JobLostError, Platform
from worker.request.pipeline import only_job_errors
from worker.settings import Settings
from worker.telemetry.logs import frames
from worker.telemetry.usage import Usage, current_usage

INSTANT_SECONDS = 0.2
"""The least time between two polls that change nothing."""

AGAIN_SECONDS = 30.0
"""A stop so soon after a job has arrived again belongs to the time before that."""

LAST_JOBS_SECONDS = 0.5
"""How long to wait for jobs that are being transferred when the worker is stopped."""

log = logging.getLogger(__name__)


class JobIds(Protocol):
    """The ids of the jobs that run, for the platform's pings."""

    def add(self, job_id: str, /) -> None:
        """Add the id of a job that begins."""

    def remove(self, job_id: str, /) -> None:
        """Remove the id of a job that has ended."""


@dataclass(frozen=True, slots=True)
class Context:
    """What the job loop needs of the worker."""

    lifecycle: Lifecycle
    settings: Settings
    died: Callable[[], Coroutine[Any, Any, object]]
    """Returns when the worker cannot answer any more. Its exception ends the worker."""
    places: Places
    posted: Callable[[], None]
    """Called for every part of a stream that is posted."""
    store: StoreResult = store_nothing
    """Stores results that are too large for the platform."""


@dataclass(slots=True, eq=False)
class _Run:
    """One job that runs."""

    job: Job
    usage: Usage = field(default_factory=Usage)
    again: tuple[Job, float] | None = None
    """The same job, if it has arrived once more, and when."""
    has_output: bool = False
    has_ended: bool = False
    """Whether its result was posted."""
    task: "asyncio.Task[None]" = field(init=False)

    @property
    def is_batch(self) -> bool:
        return is_batch(self.job.get("input"))

    @property
    def is_starting(self) -> bool:
        return not (self.has_output or self.usage.has_reached_engine or self.is_batch)

    @property
    def is_stopped(self) -> bool:
        return self.task.cancelling() > 0


class JobLoop:
    """Takes and runs jobs."""

    def __init__(self, handler: Handler, platform: Platform, job_ids: JobIds, context: Context) -> None:
        self._handler = handler
        self._platform = platform
        self._job_ids = job_ids
        self._context = context
        self._lifecycle = context.lifecycle
        self._places = context.places
        self._runs: dict[str, _Run] = {}
        """By the job's id."""
        self._failed = asyncio.Event()

    async def run(self) -> None:
        """Take and run jobs until the worker is stopped, then give the running ones some time to finish.

        Raises:
            EngineDiedError: the engine died.
        """
        taking, listening = (asyncio.create_task(poll) for poll in (self._take_jobs(), self._stop_jobs()))
        for task in (taking, listening):
            task.add_done_callback(self._poll_ended)
        try:
            idle = functools.partial(self._idle, taking)
            await self._lifecycle.serve(self._died(), idle, self._context.settings.grace)
        finally:
            await race.end(taking, listening)
            await self._cancel_jobs()

    def _poll_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            log.error("The job loop has failed:\n%s", frames(error))
            self._lifecycle.fail("its job loop has failed")
            self._failed.set()

    async def _died(self) -> None:
        """Wait until the worker cannot go on."""
        (await race.first(self._context.died(), self._loop_failed())).result()

    async def _loop_failed(self) -> None:
        await self._failed.wait()
        raise StartupError("The job loop has failed; the log above has the cause.")

    async def _idle(self, taking: asyncio.Task[None], seconds: float) -> None:
        """Wait for jobs that are being transferred, and then at most `seconds` until none runs."""
        # For the platform, jobs that are being transferred are taken.
        await asyncio.wait([taking], timeout=LAST_JOBS_SECONDS)
        await race.end(taking)
        clock = asyncio.get_running_loop().time
        end = clock() + seconds
        while self._runs and (left := end - clock()) > 0:
            await asyncio.wait([run.task for run in self._runs.values()], timeout=left)

    async def _cancel_jobs(self) -> None:
        runs = dict(self._runs)
        for job_id, run in runs.items():
            log.error("Job %s ends without a result", job_id)
            run.again = None
            run.task.cancel()
        if runs:
            await asyncio.wait([run.task for run in runs.values()], timeout=ERROR_SECONDS)

    async def _take_jobs(self) -> None:
        """Ask for as many jobs as there are free places, until the worker is stopped."""
        while free := await self._free_places():
            await _at_least_a_moment(self._take(free))

    async def _take(self, free: int) -> bool:
        """Ask once, and return whether any job began."""
        jobs = await self._platform.take(free, bool(self._runs))
        began = [self._begin(job) for job in jobs]
        # The jobs reserve the memory for their bodies before the next ones are asked for.
        await asyncio.sleep(0.001)
        return any(began)

    async def _free_places(self) -> int:
        """Wait for free places and return their number; 0 once the worker is stopped."""
        stopping, changed = self._lifecycle.stopping, self._places.changed
        while not stopping.is_set():
            changed.clear()
            starting = sum(run.is_starting for run in self._runs.values())
            # Batches make room for other jobs. Only those that wait for their turn take a place.
            batches = sum(run.is_batch for run in self._runs.values())
            jobs = len(self._runs) - min(batches, 1)
            free = 0 if self._lifecycle.state == "dead" else self._places.free(jobs, starting)
            if free:
                return free
            await race.first(changed.wait(), stopping.wait())
        return 0

    async def _stop_jobs(self) -> None:
        """Cancel the jobs that the platform stops, also while the worker is being stopped."""
        while True:
            await _at_least_a_moment(self._stop())

    async def _stop(self) -> bool:
        """Ask once, and return whether any job was stopped."""
        runs = [run for job_id in await self._platform.stops() if (run := self._runs.get(job_id))]
        stopped = [run.task.cancel() for run in runs if not run.is_stopped]
        return any(stopped)

    def _begin(self, job: Job) -> bool:
        """Start a job, unless it runs already; return whether it was started."""
        job_id = job["id"]
        if run := self._runs.get(job_id):
            log.warning("Job %s arrived again while it runs; it gets one result", job_id)
            run.again = job, asyncio.get_running_loop().time()
            return False
        run = self._runs[job_id] = _Run(job)
        run.task = asyncio.create_task(self._run(run))
        run.task.add_done_callback(functools.partial(self._ended, run))
        self._job_ids.add(job_id)
        return True

    def _ended(self, run: _Run, task: asyncio.Task[None]) -> None:
        job_id = run.job["id"]
        if not task.cancelled() and (error := task.exception()):
            log.error("Job %s ends without a result:\n%s", job_id, frames(error))
        del self._runs[job_id]
        self._job_ids.remove(job_id)
        self._places.changed.set()
        if run.again and not run.has_ended:
            job, arrived = run.again
            # The platform has stopped the job and given it again. The two may arrive in either order.
            if asyncio.get_running_loop().time() - arrived < AGAIN_SECONDS:
                self._begin(job)

    async def _run(self, run: _Run) -> None:
        """Post a job's outputs one by one, then its result. Nothing is posted for a stopped job."""
        job_id = run.job["id"]
        delivery = Delivery(self._platform, run.job, self._context.posted, self._context.store)
        current_usage.set(run.usage)
        try:
            with only_job_errors(job_id):
                await self._answer(run, delivery)
        except JobLostError as error:
            log.error("Job %s is cancelled: %s", job_id, error)
        except JobError as error:
            await delivery.failed(json.dumps(error.error()))

    async def _answer(self, run: _Run, delivery: Delivery) -> None:
        error = None
        async with aclosing(self._handler(run.job)) as outputs:
            async for output in outputs:
                if isinstance(output, Progress):
                    await self._platform.progress(run.job["id"], output.value)
                    continue
                if isinstance(output, Left):
                    log.warning("Job %s is left to the platform. %s", run.job["id"], output.reason)
                    return
                if not run.has_output and self._leaves_unfinished:
                    log.warning("Job %s is left to the platform, which may give it to another worker", run.job["id"])
                    return
                run.has_output = True
                if isinstance(output, dict) and (error := output.get("error")):
                    break
                await delivery.part(output)
        await (delivery.failed(error) if error else delivery.done())
        run.has_ended = True

    @property
    def _leaves_unfinished(self) -> bool:
        """Whether jobs that have said nothing are left to the platform now, because another worker may answer them."""
        is_over = self._lifecycle.over.is_set() or self._lifecycle.state == "dead"
        may_help = self._lifecycle.state != "refused" and self._context.settings.unfinished_jobs == "leave"
        return is_over and may_help


async def _at_least_a_moment(poll: Awaitable[bool]) -> None:
    """Wait for a poll. One that changes nothing takes at least `INSTANT_SECONDS`."""
    clock = asyncio.get_running_loop().time
    began = clock()
    if not await poll:
        await asyncio.sleep(began + INSTANT_SECONDS - clock())
