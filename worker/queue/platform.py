"""RunPod's queue, as one worker sees it: takes jobs, learns which ones to stop, and posts parts and results.

All knowledge of URLs, HTTP statuses and retries is here. If a connection breaks before its answer arrives, the platform
may get the same post twice.

The SDK's own requests lose jobs and results: they drop a job whose empty input the platform has dropped, and give up on
a post after three 5xx answers, and at once after a 429 or a refused connection.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from worker.backoff import Backoff
from worker.errors import ResultRefusedError
from worker.queue.handler import Job
from worker.queue.transport import NoAnswerError, Transport
from worker.request.asgi import ClientDisconnectedError
from worker.resume import Resumes

T = TypeVar("T")

HEADERS = {"Content-Type": "application/x-www-form-urlencoded", "charset": "utf-8"}
"""The SDK's headers of posts. The body is JSON in spite of them."""
PART_BYTES = 1_000_000
RESULT_BYTES = 20_000_000
"""The platform's limits."""
NO_JOB = (204, 400)
"""HTTP statuses for an empty queue. 400 has been seen with FlashBoot."""
TOO_MANY_REQUESTS = 429
TOO_MANY_REQUESTS_SECONDS = 5.0
"""The pause after a long poll that was answered with 429."""
FORGOTTEN_ANSWERS = 4
"""After so many answers in a row that the platform does not know a job, it has forgotten it. They take about 1 s."""
PROGRESS_SECONDS = 10.0
"""How long a post of a job's progress may take."""
LEAVING_SECONDS = 0.5
"""The longest pause between attempts of a worker that is being stopped."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Urls:
    """The platform's routes for one worker, each with a query. `$ID` stands for the job's id."""

    take: str
    take_batch: str
    stop: str | None
    """None: the platform has no such route."""
    stream: str
    done: str


class Verdict(Enum):
    """What the answer to a post says about it."""

    TAKEN = "taken"
    AGAIN = "try again"
    REFUSED = "refused for good"
    FORGOTTEN = "the job is unknown"


def verdict(status: int) -> Verdict:
    """Return what an HTTP status says about a post."""
    match status:
        case 404 | 410:
            return Verdict.FORGOTTEN
        case 408 | 425 | 429:
            return Verdict.AGAIN
        case _ if 200 <= status < 300:
            return Verdict.TAKEN
        case _:
            return Verdict.REFUSED if 400 <= status < 500 else Verdict.AGAIN


class JobLostError(ClientDisconnectedError):
    """Nobody waits for a job any more. The message is the reason."""


class Platform:
    """The platform's routes for one worker. `deadline` is how long a post is repeated, in seconds."""

    def __init__(
        self,
        transport: Transport,
        urls: Urls,
        stopping: asyncio.Event,
        deadline: float,
        resumes: Resumes | None = None,
    ) -> None:
        self._transport = transport
        self._urls = urls
        self._stopping = stopping
        self._deadline = deadline
        self._resumes = resumes or Resumes()
        self._taking = Backoff(first=0.1, most=10.0)
        self._listening = Backoff(first=0.1, most=10.0)

    async def take(self, most: int, is_busy: bool) -> list[Job]:
        """Wait for jobs and return up to `most`; none after some time, after a failure, or when the worker is stopped.

        `is_busy` tells the platform whether jobs run in this worker.
        """
        url = f"{self._urls.take_batch}&batch_size={most}" if most > 1 else self._urls.take
        return await self._poll("job-take", f"{url}&job_in_progress={is_busy:d}", _jobs, self._taking, self._stopping)

    async def stops(self) -> list[str]:
        """Wait for the ids of jobs to stop; none after some time or after a failure."""
        if (url := self._urls.stop) is None:
            log.warning("The platform has no job-stop route: cancelled jobs run to their end")
            return await asyncio.Future()
        return await self._poll("job-stop", url, _stopped, self._listening)

    async def stream(self, job_id: str, output: Any) -> None:
        """Post one part of a stream.

        Raises:
            ResultRefusedError: the platform does not accept the part.
            JobLostError: the platform does not know the job any more, or it was away for too long.
        """
        await self._post(self._urls.stream, job_id, encoded({"output": output}), PART_BYTES, "false")

    async def done(self, job_id: str, result: bytes) -> None:
        """Post a job's result as JSON: `{"output": [every part]}` or `{"error": text}`.

        Raises:
            ResultRefusedError: the platform does not accept the result.
            JobLostError: the platform was away for too long.
        """
        await self._post(self._urls.done, job_id, result, RESULT_BYTES, "true")

    async def progress(self, job_id: str, value: Any) -> None:
        """Post what `/status` shows while the job runs, as the SDK's `progress_update` does. A failure is logged."""
        url, headers = _addressed(self._urls.done, job_id, "false")
        body = encoded({"status": "IN_PROGRESS", "output": value})
        try:
            async with asyncio.timeout(PROGRESS_SECONDS):
                status = await self._transport.post(url, headers, body)
            problem = None if verdict(status) is Verdict.TAKEN else f"HTTP {status}"
        except TimeoutError:
            problem = "TimeoutError"
        except NoAnswerError as error:
            problem = str(error)
        if problem:
            log.info("Job %s: the platform did not accept its progress (%s)", job_id, problem)

    async def _poll(
        self,
        name: str,
        url: str,
        parse: Callable[[bytes], list[T]],
        backoff: Backoff,
        stopping: asyncio.Event | None = None,
    ) -> list[T]:
        """Poll once. A poll that fails is followed by a pause, which becomes longer while polls fail."""
        pause = 0.0
        try:
            answer = await self._transport.get(url, stopping)
            if answer is None or answer.status in NO_JOB:
                values = []
            elif answer.status == 200:
                values = parse(answer.body)
            else:
                pause = TOO_MANY_REQUESTS_SECONDS if answer.status == TOO_MANY_REQUESTS else 0.0
                raise NoAnswerError(f"HTTP {answer.status}")
        except (NoAnswerError, ValueError) as error:
            log.warning("%s failed: %s", name, error)
            await self._pause(max(backoff.next(), pause))
            return []
        backoff.reset()
        return values

    async def _post(self, route: str, job_id: str, body: bytes, limit: int, is_stream: str) -> None:
        """Post until the platform takes it. Time in which the worker was frozen does not count for the deadline."""
        if len(body) > limit:
            raise ResultRefusedError(len(body))
        url, headers = _addressed(route, job_id, is_stream)
        clock, backoff = asyncio.get_running_loop().time, Backoff(first=0.2, most=10.0)
        began, spent, unknown = clock() - self._resumes.frozen_seconds, 0.0, 0
        while spent < self._deadline:
            try:
                status = await self._transport.post(url, headers, body)
            except NoAnswerError as error:
                answer, problem = Verdict.AGAIN, str(error)
            else:
                answer, problem = verdict(status), f"HTTP {status}"
            if answer is Verdict.TAKEN:
                if spent:
                    log.info("Job %s: the platform accepted a post after %.1f s", job_id, spent)
                return
            if answer is Verdict.REFUSED:
                raise ResultRefusedError(len(body), status)
            unknown = unknown + 1 if answer is Verdict.FORGOTTEN else 0
            if unknown == FORGOTTEN_ANSWERS and route == self._urls.stream:
                raise JobLostError("the platform does not know it any more")
            if unknown == FORGOTTEN_ANSWERS:
                raise ResultRefusedError(len(body), status)
            if not spent:
                log.warning("Job %s: the platform did not accept a post (%s); trying again", job_id, problem)
            await self._pause(backoff.next())
            spent = clock() - self._resumes.frozen_seconds - began
        raise JobLostError(f"the platform was away for {spent:.0f} s; DELIVERY_TIMEOUT={self._deadline:g}")

    async def _pause(self, seconds: float) -> None:
        """Wait before the next attempt; only a moment once the worker is being stopped, and has little time left."""
        if self._stopping.is_set():
            await asyncio.sleep(min(seconds, LEAVING_SECONDS))
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()


def _addressed(route: str, job_id: str, is_stream: str) -> tuple[str, dict[str, str]]:
    """Return the URL and the headers of a post."""
    return f"{route.replace('$ID', job_id)}&isStream={is_stream}", {**HEADERS, "X-Request-ID": job_id}


def encoded(value: Any) -> bytes:
    """Return a value as JSON, as posts contain it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def _jobs(body: bytes) -> list[Job]:
    """Return the jobs in an answer; raise ValueError if it is not empty and contains none."""
    values = _json(body) if body else []
    values = values if isinstance(values, list) else [values]
    jobs = [job for job in values if isinstance(job, dict) and isinstance(job.get("id"), str)]
    if len(jobs) < len(values):
        log.error("The platform sent %d jobs without an id; they cannot be answered", len(values) - len(jobs))
    if values and not jobs:
        raise ValueError("no job with an id")
    return jobs


def _stopped(body: bytes) -> list[str]:
    """Return the ids in an answer `{"jobsToStop": [id, …]}`."""
    value = _json(body)
    ids = value.get("jobsToStop") if isinstance(value, dict) else None
    if not isinstance(ids, list):
        raise ValueError("no list of jobs")
    return [job_id for job_id in ids if isinstance(job_id, str)]


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except RecursionError:
        raise ValueError("the answer is nested too deeply") from None
