"""Takes jobs from RunPod's queue while others run, starts them as they arrive, and cancels those that are stopped.

`JobLoop` replaces the SDK's `JobScaler`, whose loop polls its own queue every 100 ms, sleeps for 1 s when it thinks
that it is full, and counts a queued job twice. The SDK still provides the URLs, the session, the stop signals, and the
list of running jobs that its ping process reports. tests/project/test_drift.py checks what this module relies on.
"""

import asyncio
import functools
import json
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
from runpod.http_client import AsyncClientSession
from runpod.serverless.modules import rp_http, rp_job, rp_scale

from worker import race
from worker.backoff import Backoff
from worker.errors import StartupError
from worker.lifecycle import ERROR_SECONDS, Lifecycle
from worker.queue.delivery import Delivery
from worker.queue.handler import Job
from worker.settings import Settings
from worker.telemetry.logs import frames

T = TypeVar("T")

NO_JOB = (204, 400)
"""HTTP statuses for an empty queue. 400 has been seen with FlashBoot."""

INSTANT_SECONDS = 0.2
"""The least time between two polls that bring nothing."""

LAST_JOBS_SECONDS = 0.5
"""How long to wait for jobs that are being transferred when the worker is stopped."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Context:
    """What the job loop needs of the worker."""

    runner: asyncio.Runner
    """The event loop in which the engine was attached."""
    lifecycle: Lifecycle
    settings: Settings
    died: Callable[[], Coroutine[Any, Any, object]]
    """Returns when the worker cannot answer any more. Its exception ends the worker."""
    room: Callable[[], int]
    """Returns the number of jobs of any size for which there is memory."""
    posted: Callable[[], None]
    """Called for every part of a stream that is posted."""


def install(context: Context) -> None:
    """Make the SDK run its worker with `JobLoop`."""
    rp_scale.JobScaler = functools.partial(JobLoop, context=context)


class JobLoop(rp_scale.JobScaler):  # type: ignore[misc]
    """Takes and runs jobs. `config` is the argument of `runpod.serverless.start`."""

    def __init__(self, config: dict[str, Any], context: Context) -> None:
        super().__init__(config)
        self._context = context
        self._lifecycle = context.lifecycle
        self._silent: set[str] = set()
        self._is_receiving = False
        self._places: int = self.concurrency_modifier(1)
        self._changed = asyncio.Event()
        self._failed = asyncio.Event()
        self._polls: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Run until the platform stops the worker."""
        self._context.runner.run(self.run())

    async def run(self) -> None:
        """Take and run jobs until the worker is stopped, then give the running ones some time to finish.

        Raises:
            EngineDiedError: the engine died; the running jobs have failed.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._lifecycle.stopping.set)
        async with AsyncClientSession() as session:
            self._polls = [asyncio.create_task(poll(session)) for poll in (self.get_jobs, self.monitor_stop_signals)]
            for task in self._polls:
                task.add_done_callback(self._poll_ended)
            try:
                await self._lifecycle.serve(self._died(), self._idle, self._context.settings.grace)
            finally:
                await race.end(*self._polls)
                await self._cancel_jobs()

    def _poll_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            log.error("The job loop has failed:\n%s", frames(error))
            self._lifecycle.fail("its job loop has failed")
            self._failed.set()

    async def _died(self) -> None:
        """Wait until the worker cannot go on. Jobs that the platform may retry are cancelled then."""
        died = asyncio.ensure_future(self._context.died())
        try:
            if await race.first(died, self._failed.wait()) is not died:
                raise StartupError("The job loop has failed; the log above has the cause.")
            died.result()
        finally:
            await race.end(died)
        await race.end(*(self.jobs_tasks[job_id] for job_id in self._silent if self._is_left_to_platform(job_id)))

    async def _idle(self, seconds: float) -> None:
        """Stop taking jobs, and wait at most `seconds` until none runs."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_JOBS_SECONDS):
                # For the platform, jobs that are being transferred are taken.
                while self._is_receiving:  # noqa: ASYNC110 - once, when the worker ends
                    await asyncio.sleep(0.01)
        await race.end(*self._polls)
        if self.jobs_tasks:
            await asyncio.wait(self.jobs_tasks.values(), timeout=seconds)

    async def _cancel_jobs(self) -> None:
        running = dict(self.jobs_tasks)
        for job_id, task in running.items():
            log.error("Job %s ends without a result", job_id)
            task.cancel()
        if running:
            await asyncio.wait(running.values(), timeout=ERROR_SECONDS)

    async def get_jobs(self, session: aiohttp.ClientSession) -> None:
        """Ask for as many jobs as there are free places, for as long as the worker runs."""
        delivery = Delivery(session, rp_http.JOB_STREAM_URL, rp_http.JOB_DONE_URL, self._context.posted)

        async def take() -> list[Job]:
            # The jobs that were just taken reserve the memory for their bodies first.
            await asyncio.sleep(0.001)
            free = await self._free_places()
            async with asyncio.timeout(self.jobs_fetcher_timeout):
                return await self._take(session, free)

        async for jobs in _poll("job-take", take):
            for job in jobs:
                if self._lifecycle.state == "dead":
                    log.error("Job %s is left to the platform: the engine is dead", job["id"])
                else:
                    self._begin(job, delivery)

    async def monitor_stop_signals(self, session: aiohttp.ClientSession) -> None:
        """Cancel the jobs that the platform stops."""

        async def listen() -> list[str]:
            async with asyncio.timeout(self.stop_signals_fetcher_timeout):
                job_ids: list[str] = await self.stop_signals_fetcher(session)
                return job_ids

        if rp_job._job_stop_url() is None:
            log.warning("The platform has no job-stop route: cancelled jobs run to their end")
            await self._lifecycle.stopping.wait()
            return
        async for job_ids in _poll("job-stop", listen):
            for job_id in job_ids:
                await self.stop_job(job_id)

    async def _free_places(self) -> int:
        """Wait for free places and return their number, as far as there is memory for the jobs' bodies."""
        while True:
            free = min(self._places - len(self.jobs_tasks), self._context.room())
            if free > 0 and not self._lifecycle.stopping.is_set() and self._lifecycle.state != "dead":
                return free
            self._changed.clear()
            await self._changed.wait()

    def _begin(self, job: Job, delivery: Delivery) -> None:
        if job["id"] in self.jobs_tasks:
            log.warning("Job %s arrived again while it runs; it gets one result", job["id"])
            return
        self.job_progress.add(job["id"])
        self._silent.add(job["id"])
        task = asyncio.create_task(self._run(job, delivery))
        self.jobs_tasks[job["id"]] = task
        task.add_done_callback(functools.partial(self._ended, job["id"]))

    def _ended(self, job_id: str, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            log.error("Job %s ends without a result:\n%s", job_id, frames(error))
        del self.jobs_tasks[job_id]
        self._silent.discard(job_id)
        self.job_progress.remove(job_id)
        self._changed.set()

    async def _run(self, job: Job, delivery: Delivery) -> None:
        """Post a job's yields one by one, then its result. Nothing is posted for a stopped job."""
        outputs: list[Any] = []
        result: dict[str, Any] = {"output": outputs}
        async with aclosing(self.config["handler"](job)) as yields:
            async for output in yields:
                if self._is_left_to_platform(job["id"]):
                    return
                if isinstance(output, dict) and output.get("error"):
                    result = {"error": output["error"]}
                    break
                self._silent.discard(job["id"])
                outputs.append(output)
                await delivery.stream(job["id"], output)
        await delivery.done(job["id"], result)

    async def _take(self, session: aiohttp.ClientSession, most: int) -> list[Job]:
        """Ask for up to `most` jobs. The SDK's own request loses jobs whose empty input the platform has dropped."""
        try:
            async with session.get(rp_job._job_get_url(most)) as answer:
                if answer.status in NO_JOB:
                    return []
                answer.raise_for_status()
                self._is_receiving = True
                return _jobs(await answer.read())
        finally:
            # There is no `await` between here and the start of the jobs.
            self._is_receiving = False

    def _is_left_to_platform(self, job_id: str) -> bool:
        """Return whether the platform may retry a job, because it had no output when the engine died."""
        retries = self._context.settings.on_engine_death == "retry"
        return retries and job_id in self._silent and self._lifecycle.state == "dead"


def _jobs(body: bytes) -> list[Job]:
    """Return the jobs in the body of a response; raise ValueError if it is not empty and contains none."""
    try:
        values = json.loads(body) if body else []
    except RecursionError:
        raise ValueError("the jobs are nested too deeply") from None
    values = values if isinstance(values, list) else [values]
    jobs = [job for job in values if isinstance(job, dict) and isinstance(job.get("id"), str)]
    if len(jobs) < len(values):
        log.error("The platform sent %d jobs without an id; they cannot be answered", len(values) - len(jobs))
    if values and not jobs:
        raise ValueError("no job with an id")
    return jobs


async def _poll(name: str, fetch: Callable[[], Awaitable[list[T]]]) -> AsyncIterator[list[T]]:
    """Repeat a long poll for ever and yield its results. The pauses become longer while it fails."""
    backoff = Backoff(first=0.1, most=10.0)
    while True:
        asked = asyncio.get_running_loop().time()
        try:
            result = await fetch()
        except TimeoutError:
            result = []
        except (aiohttp.ClientError, OSError, ValueError, RecursionError) as error:
            # Without the URL, which contains the worker's key.
            status = f"HTTP {error.status}" if isinstance(error, aiohttp.ClientResponseError) else None
            log.warning("%s failed: %s", name, status or type(error).__name__)
            await asyncio.sleep(backoff.next())
            continue
        backoff.reset()
        if result:
            yield result
        else:
            await asyncio.sleep(asked + INSTANT_SECONDS - asyncio.get_running_loop().time())
