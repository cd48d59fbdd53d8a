"""What happened in one schedule, and whether it may happen: the invariants."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from tests.simulation.engine import Engine
from tests.simulation.plan import Plan
from worker.queue.handler import Handler, Job, Output
from worker.queue.platform import (
    FORGOTTEN_ANSWERS,
    LEAVING_SECONDS,
    TOO_MANY_REQUESTS,
    TOO_MANY_REQUESTS_SECONDS,
    Verdict,
    verdict,
)
from worker.queue.transport import POST_SECONDS
from worker.request import sse

CANCEL_SECONDS = 1.0
"""How soon after a stop the engine must be rid of the job's request."""
POLL_SECONDS = 0.19
"""The least time between two job-stop polls of which the first changed nothing."""


@dataclass(slots=True, eq=False)
class Post:
    """One attempt to post something."""

    route: str
    value: dict[str, Any]
    sent: float
    status: int | None = None
    """The answer that the worker got; None without one."""
    answered: float = float("inf")
    """When the attempt ended, with or without an answer."""

    @property
    def verdict(self) -> Verdict:
        return Verdict.AGAIN if self.status is None else verdict(self.status)


@dataclass(slots=True, eq=False)
class Run:
    """One job that runs in the worker."""

    job_id: str
    began: float
    posts: list[Post] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    stopped: float | None = None
    """When the worker learnt that it has to stop the job."""
    ended: float = float("inf")

    def of(self, route: str, *verdicts: Verdict) -> list[Post]:
        return [post for post in self.posts if post.route == route and (not verdicts or post.verdict in verdicts)]

    @property
    def is_forgotten(self) -> bool:
        """Whether the platform has said often enough that it does not know the job."""
        last = self.posts[-FORGOTTEN_ANSWERS:]
        return [post.verdict for post in last] == [Verdict.FORGOTTEN] * FORGOTTEN_ANSWERS and (
            last[0].value == last[-1].value
        )


class History:
    """Records events, and collects violations of the invariants."""

    def __init__(self, plan: Plan, engine: Engine, stopping: asyncio.Event) -> None:
        self.plan = plan
        self._stopping = stopping
        self._stopped_at = float("inf")
        self.violations: list[str] = []
        self.active: set[str] = set()
        """The jobs that run in the worker, by its own account. It adds and removes them."""
        self.changed = asyncio.Event()
        self._engine = engine
        self._runs: list[Run] = []
        self._latest: dict[str, Run] = {}
        self._arrivals: list[tuple[str, float]] = []
        self._generating = 0
        self._idle_stop_poll = self._too_many_requests = float("-inf")

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def violated(self, text: str) -> None:
        self.violations.append(f"at {self.now:.3f} s: {text}")

    def stops(self) -> None:
        """The worker is stopped."""
        self._stopped_at = self.now

    # ---- The worker's account of its jobs

    def add(self, job_id: str) -> None:
        self.active.add(job_id)

    def remove(self, job_id: str) -> None:
        self.active.remove(job_id)
        self._latest[job_id].ended = min(self._latest[job_id].ended, self.now)
        self.changed.set()

    def handler(self, handler: Handler) -> Handler:
        """Return a handler that records its jobs."""

        async def recorded(job: Job) -> AsyncGenerator[Output, None]:
            run = Run(job["id"], self.now)
            if previous := self._latest.get(run.job_id):
                previous.ended = min(previous.ended, self.now)
            self._runs.append(run)
            self._latest[run.job_id] = run
            self._generating += 1
            places = self.plan.capacity + self.plan.capacity // 16
            if self._generating > places:
                self.violated(f"the worker hoards: {self._generating} jobs for {places} places")
            most = self.plan.settings["max_concurrency"]
            if most and self._generating > most:
                self.violated(f"{self._generating} jobs at once, MAX_CONCURRENCY={most}")
            try:
                async with aclosing(handler(job)) as outputs:
                    async for output in outputs:
                        run.outputs.append(output)
                        yield output
            finally:
                self._generating -= 1

        return recorded

    # ---- The platform's account of what it sends and gets

    def arrived(self, job_id: str) -> None:
        """A job has arrived in the worker."""
        self._arrivals.append((job_id, self.now))

    def asked(self, most: int) -> None:
        """The worker asks for jobs."""
        if most > self.plan.settings["job_batch_size"]:
            self.violated(f"the worker asked for {most} jobs at once")
        if self._engine.waiting:
            self.violated("the worker asked for jobs while requests wait in its engine")
        if self._stopping.is_set():
            self.violated("the worker asked for jobs after it was stopped")
        if self.now - self._too_many_requests < TOO_MANY_REQUESTS_SECONDS - 0.1:
            self.violated("the worker asked for jobs too soon after 429")

    def refused_jobs(self, status: int) -> None:
        """The worker gets an error instead of jobs."""
        if status == TOO_MANY_REQUESTS:
            self._too_many_requests = self.now

    def listens(self) -> None:
        """The worker asks which jobs to stop."""
        if self.now - self._idle_stop_poll < POLL_SECONDS:
            self.violated("job-stop is polled without a pause")

    def heard(self, job_ids: list[str], asked: float) -> None:
        """The worker has learnt which jobs to stop."""
        self._idle_stop_poll = asked
        for job_id in job_ids:
            run = self._latest.get(job_id)
            if run is None or run.stopped is not None or job_id not in self.active:
                continue
            run.stopped = self.now
            self._idle_stop_poll = float("-inf")
            # Twice, because after a jump of the clock all timers end at once.
            call_later = asyncio.get_running_loop().call_later
            call_later(CANCEL_SECONDS, call_later, CANCEL_SECONDS, self._check_cancelled, run)

    def _check_cancelled(self, run: Run) -> None:
        if run.job_id in self._engine.requests and self._latest[run.job_id] is run:
            self.violated(f"the engine still has a request of {run.job_id}, which was stopped at {run.stopped:.3f} s")

    def posts(self, job_id: str, route: str, value: dict[str, Any]) -> Post:
        """The worker posts something."""
        post = Post(route, value, self.now)
        if (run := self._latest.get(job_id)) is None:
            self.violated(f"a post for {job_id}, which does not run")
            return post
        if run.stopped is not None and self.now > run.stopped:
            self.violated(f"a post for {job_id}, which was stopped at {run.stopped:.3f} s")
        if run.is_forgotten:
            self.violated(f"a post for {job_id}, which the platform has forgotten")
        self._check_order(run, post)
        run.posts.append(post)
        return post

    def _check_order(self, run: Run, post: Post) -> None:
        if not run.posts:
            return
        last = run.posts[-1]
        if last.value == post.value and last.verdict is not Verdict.TAKEN:
            if self.now - max(last.answered, self._stopped_at) > LEAVING_SECONDS + 0.01:
                self.violated(f"{run.job_id} waits too long before its next attempt, while the worker is being stopped")
            return
        if last.route == "done" and last.verdict is not Verdict.REFUSED:
            self.violated(f"{run.job_id} ends twice: a post after its result")
        if post.route == "stream" and last.verdict is not Verdict.TAKEN:
            self.violated(f"a hole: {run.job_id} posts a part after one that was not accepted")
        if last.verdict is Verdict.AGAIN:
            self.violated(f"{run.job_id} gave up a post that it has to repeat")

    # ---- At the end

    def check(self, ended: float) -> None:
        """Check every run and every arrival, once the worker has ended."""
        for job_id, at in self._arrivals:
            if not any(run.job_id == job_id and _answers(run, at) for run in self._runs):
                self.violated(f"{job_id}, which arrived at {at:.3f} s, was dropped")
        for run in self._runs:
            self._check_parts(run)
            if not self._has_ended(run, ended):
                self.violated(f"{run.job_id}, which began at {run.began:.3f} s, has no end")

    def _has_ended(self, run: Run, ended: float) -> bool:
        """Return whether a run ended in one of the ways that are allowed."""
        done, last = run.of("done"), run.posts[-1] if run.posts else None
        if run.stopped is not None or (done and done[-1].verdict is Verdict.TAKEN):
            return True
        dead = float("inf") if self.plan.dies_at is None else self.plan.dies_at
        is_over = run.ended >= min(ended - 20.0, dead)
        if last is None:
            return is_over and self.plan.settings["unfinished_jobs"] == "leave"
        same = [post for post in run.posts if post.value == last.value]
        if last.verdict is Verdict.REFUSED:
            # Only the refusal of an error is final.
            return "error" in last.value and last.route == "done"
        if run.is_forgotten:
            return True
        # An answer that has not arrived when the worker ends, or for longer than the deadline.
        deadline = self.plan.settings["delivery_timeout"]
        is_late = last.sent - same[0].sent >= deadline - POST_SECONDS - 10.0
        return last.verdict is not Verdict.TAKEN and (is_over or is_late)

    def _check_parts(self, run: Run) -> None:
        """The parts are the first ones of the result, all of them unless one was refused, and have no holes."""
        parts = [post.value["output"] for post in run.of("stream", Verdict.TAKEN)]
        results = [post.value["output"] for post in run.of("done") if "output" in post.value]
        for result in results:
            if parts != result[: len(parts)]:
                self.violated(f"the parts of {run.job_id} are not the beginning of its result")
            if len(parts) < len(result) and not run.of("stream", Verdict.REFUSED):
                self.violated(f"{run.job_id} has a result with more parts than its stream")
        planned = next(job for job in self.plan.jobs if job.job_id == run.job_id)
        numbers = _numbers(results[-1] if results else parts)
        if planned.form == "value":
            return
        if numbers != list(range(len(numbers))) or len(numbers) > planned.events:
            self.violated(f"the events of {run.job_id} have holes: {numbers}")
        if results and not _has_error(results[-1]) and len(numbers) < planned.events:
            self.violated(f"the result of {run.job_id} is incomplete")


def _answers(run: Run, at: float) -> bool:
    """Return whether a run is the answer to a job that arrived at a time. A stopped run is none to a later arrival."""
    return run.began >= at or (run.ended >= at and run.stopped is None)


def _events(output: list[Any]) -> list[Any]:
    """Return the chunks in a list of parts, of which each is SSE text or a list of objects."""
    events: list[Any] = []
    for part in output:
        if isinstance(part, str):
            events += (sse.payload(event) for event in sse.split(part.encode()))
        else:
            events += part if isinstance(part, list) else [part]
    return [event for event in events if event is not None]


def _numbers(output: list[Any]) -> list[int]:
    return [event["n"] for event in _events(output) if "n" in event]


def _has_error(output: list[Any]) -> bool:
    return any("error" in event for event in _events(output))
