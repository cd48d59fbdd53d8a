"""RunPod's queue, event-driven: jobs are taken while others run, start as they arrive, and end when stopped.

`JobLoop` takes the place of the SDK's `JobScaler`, whose loop polls its own queue every 100 ms, sleeps 1 s when it
believes it is full, and counts a queued job twice. What it keeps of the SDK's are the URLs, the session, the stop
signals, and the list of jobs in progress that the ping process reports. tests/project/test_drift.py checks these.
"""

import asyncio
import functools
import json
import logging
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
from runpod.http_client import AsyncClientSession
from runpod.serverless.modules import rp_http, rp_job, rp_scale

from worker import processes as program
from worker.backoff import Backoff
from worker.errors import ENGINE_DIED, LEAVING, EngineDiedError, JobError, UnavailableError
from worker.queue.delivery import Delivery
from worker.queue.handler import Job

T = TypeVar("T")

NO_JOB = (204, 400)
"""400 has been seen with FlashBoot."""

INSTANT_SECONDS = 0.2
"""An empty answer that comes sooner is no long poll's; the next question waits until so much time has passed."""

LAST_JOBS_SECONDS = 0.5
"""For reading jobs whose platform has begun to give them."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the job loop is told by the rest of the worker, and tells it."""

    died: Callable[[], Coroutine[Any, Any, object]]
    """Returns once the worker can answer no more; what it raises ends the worker."""
    is_dead: Callable[[], bool]
    """Whether that is so already."""
    end: Callable[[JobError], None]
    """Ends the jobs that run with an error."""
    draining: Callable[[], None]
    """Is told that no more jobs are taken."""
    posted: Callable[[], None]
    """Is told of every part of a stream that is posted."""
    grace: float
    """Seconds for the jobs that run when the platform stops the worker."""
    leaves_jobs: bool = False
    """Whether a job that has said nothing yet when the engine dies is left to the platform, which gives it again."""


def install(runner: asyncio.Runner, surroundings: Surroundings) -> None:
    """Make the SDK run its worker with `JobLoop`, in the loop of `runner`."""
    rp_scale.JobScaler = functools.partial(JobLoop, runner=runner, surroundings=surroundings)


class JobLoop(rp_scale.JobScaler):  # type: ignore[misc]
    """Takes and runs jobs; `config` is what `runpod.serverless.start` was given."""

    def __init__(self, config: dict[str, Any], runner: asyncio.Runner, surroundings: Surroundings) -> None:
        super().__init__(config)
        self._surroundings = surroundings
        self._runner = runner
        self._silent: set[str] = set()
        self._leaves = False
        self._receives = False
        self._slots: int = self.concurrency_modifier(1)
        self._changed = asyncio.Event()

    def start(self) -> None:
        """Run until the platform stops the worker."""
        self._runner.run(self.run())

    async def run(self) -> None:
        """Take and run jobs until the shutdown signal, then give what runs some time to come to its end.

        Raises:
            EngineDiedError: the engine has died; what ran has failed.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.handle_shutdown, number, None)
        async with AsyncClientSession() as session:
            shutdown = asyncio.create_task(self._shutdown_event.wait())
            died = asyncio.create_task(self._surroundings.died())
            polls = [asyncio.create_task(poll(session)) for poll in (self.get_jobs, self.monitor_stop_signals)]
            await asyncio.wait([shutdown, died, *polls[:1]], return_when=asyncio.FIRST_COMPLETED)
            self._surroundings.draining()
            ended = [task for task in (died, *polls) if task.done()]
            is_told = shutdown.done()
            self._leaves = True
            await self._receive_the_last()
            for task in (shutdown, died, *polls):
                task.cancel()
            await asyncio.wait([shutdown, died, *polls])
            if is_told and died not in ended:
                await self._finish(self._surroundings.grace)
            await self._end_jobs(ENGINE_DIED if died in ended else LEAVING)
        for task in ended:
            # A poll that ended by itself has failed in a way nobody foresaw: leave rather than go deaf.
            task.result()
        if died in ended:
            raise EngineDiedError

    async def _receive_the_last(self) -> None:
        """Wait for jobs that are on their way: the platform counts them as taken."""
        waited = 0.0
        while self._receives and waited < LAST_JOBS_SECONDS:
            await asyncio.sleep(0.01)
            waited += 0.01

    async def _finish(self, seconds: float) -> None:
        if self.jobs_tasks:
            await asyncio.wait(self.jobs_tasks.values(), timeout=seconds)

    async def _end_jobs(self, why: str) -> None:
        """End what still runs, first with an error, then without a word."""
        if self._surroundings.leaves_jobs and self._surroundings.is_dead():
            for job_id in self._silent:
                self.jobs_tasks[job_id].cancel()
        self._surroundings.end(UnavailableError(why))
        await self._finish(program.LAST_WORDS_SECONDS)
        for job_id, task in self.jobs_tasks.items():
            log.error("Job %s is left without an answer", job_id)
            task.cancel()
        await self._finish(program.LAST_WORDS_SECONDS)

    async def get_jobs(self, session: aiohttp.ClientSession) -> None:
        """Ask for as many jobs as there are free slots, for as long as the worker lives."""
        delivery = Delivery(session, rp_http.JOB_STREAM_URL, rp_http.JOB_DONE_URL, self._surroundings.posted)

        async def take() -> list[Job] | None:
            free = await self._free_slots()
            return await _within(self.jobs_fetcher_timeout, self._take(session, free))

        async for jobs in _poll("job-take", take):
            for job in jobs:
                if self._surroundings.is_dead():
                    log.error("Job %s is left to the platform: the engine is dead", job["id"])
                else:
                    self._begin(job, delivery)

    async def monitor_stop_signals(self, session: aiohttp.ClientSession) -> None:
        """Cancel the jobs that the platform names."""

        async def listen() -> list[str] | None:
            return await _within(self.stop_signals_fetcher_timeout, self.stop_signals_fetcher(session))

        if rp_job._job_stop_url() is None:
            log.warning("The platform has no job-stop route: cancelled jobs will run to their end")
            return
        async for job_ids in _poll("job-stop", listen):
            for job_id in job_ids:
                await self.stop_job(job_id)

    async def _free_slots(self) -> int:
        while (free := self._slots - len(self.jobs_tasks)) <= 0 or self._leaves or self._surroundings.is_dead():
            self._changed.clear()
            await self._changed.wait()
        return free

    def _begin(self, job: Job, delivery: Delivery) -> None:
        if job["id"] in self.jobs_tasks:
            log.warning("Job %s was given again while it runs; it will be answered once", job["id"])
            return
        self.job_progress.add(job["id"])
        self._silent.add(job["id"])
        task = asyncio.create_task(self._run(job, delivery))
        self.jobs_tasks[job["id"]] = task
        task.add_done_callback(functools.partial(self._ended, job["id"]))

    def _ended(self, job_id: str, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            log.error("Job %s was left without an answer", job_id, exc_info=error)
        del self.jobs_tasks[job_id]
        self._silent.discard(job_id)
        self.job_progress.remove(job_id)
        self._changed.set()

    async def _run(self, job: Job, delivery: Delivery) -> None:
        """Post a job's yields one by one, then its end; a stopped job ends without a word."""
        outputs: list[Any] = []
        result: dict[str, Any] = {"output": outputs}
        async with aclosing(self.config["handler"](job)) as yields:
            async for output in yields:
                if isinstance(output, dict) and output.get("error"):
                    result = {"error": output["error"]}
                    break
                if self._is_left(job["id"]):
                    return
                self._silent.discard(job["id"])
                outputs.append(output)
                await delivery.stream(job["id"], output)
        if "error" in result and self._is_left(job["id"]):
            return
        if self.config.get("refresh_worker"):
            result["stopPod"] = True
            self.kill_worker()
        await delivery.done(job["id"], result)

    async def _take(self, session: aiohttp.ClientSession, most: int) -> list[Job]:
        """Ask for up to `most` jobs. The SDK's own request loses a job whose empty input the platform has dropped.

        Raises:
            ValueError: the answer holds no job.
        """
        try:
            async with session.get(rp_job._job_get_url(most)) as answer:
                if answer.status in NO_JOB:
                    return []
                answer.raise_for_status()
                self._receives = True
                return _jobs(await answer.read())
        finally:
            # From here to where they begin nothing is waited for.
            self._receives = False

    def _is_left(self, job_id: str) -> bool:
        """Tell whether a job has said nothing before the engine died, so that the platform may give it again."""
        surroundings = self._surroundings
        return surroundings.leaves_jobs and job_id in self._silent and surroundings.is_dead()


def _jobs(body: bytes) -> list[Job]:
    """Return the jobs of an answer.

    Raises:
        ValueError: it holds none.
    """
    try:
        given = json.loads(body) if body else []
    except RecursionError:
        raise ValueError("the jobs are nested too deeply") from None
    given = given if isinstance(given, list) else [given]
    jobs = [job for job in given if isinstance(job, dict) and isinstance(job.get("id"), str)]
    if len(jobs) < len(given):
        log.error("The platform gave %d jobs without an id; they cannot be answered", len(given) - len(jobs))
    if given and not jobs:
        raise ValueError("no job with an id")
    return jobs


async def _within(seconds: float, poll: Awaitable[list[T] | None]) -> list[T] | None:
    """Return what a long poll brings; one that goes on for longer has brought nothing."""
    try:
        async with asyncio.timeout(seconds):
            return await poll
    except TimeoutError:
        return None


async def _poll(name: str, fetch: Callable[[], Awaitable[list[T] | None]]) -> AsyncIterator[list[T]]:
    """Yield what long polls bring, for ever; wait before the next one longer and longer while they fail."""
    backoff = Backoff(first=0.1, most=10.0)
    while True:
        asked = time.monotonic()
        try:
            found = await fetch()
        except (aiohttp.ClientError, OSError, ValueError, RecursionError) as error:
            log.warning("%s failed: %s", name, _described(error))
            await asyncio.sleep(backoff.next())
            continue
        backoff.reset()
        if found:
            yield found
        else:
            await asyncio.sleep(asked + INSTANT_SECONDS - time.monotonic())


def _described(error: Exception) -> str:
    """Return an error without its URL, which carries the worker's key."""
    return f"HTTP {error.status}" if isinstance(error, aiohttp.ClientResponseError) else type(error).__name__
