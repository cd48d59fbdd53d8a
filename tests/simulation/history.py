"""What happened in one schedule, and whether it may happen: the invariants."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.simulation.engine import Engine
from tests.simulation.plan import BatchPlan, Plan, RequestPlan
from worker.queue.handler import Handler, Job
from worker.queue.outputs import Output
from worker.request import sse
from worker.request.pipeline import Pipeline
from worker.telemetry.usage import Usage, current_usage

CANCEL_SECONDS = 1.0
"""How soon after a stop the engine must be rid of the job's request."""
POLL_SECONDS = 0.19
"""The least time between two job-stop polls of which the first changed nothing."""
TOO_MANY_REQUESTS_SECONDS = 4.9
"""The least time between a job-take that was answered with 429 and the next one."""
LEAVING_SECONDS = 0.51
"""The most time between two attempts to post while the worker is being stopped."""
AGAIN_SECONDS = 30.0
"""A stop so soon after a second arrival of a job does not concern that arrival."""
UNKNOWN_ANSWERS = 4
"""So many answers in a row that a job is unknown are final."""
ATTEMPT_SECONDS = 70.0
"""The longest time from one attempt to post to the next."""

Verdict = Literal["taken", "again", "refused", "unknown"]


def _verdict(status: int | None) -> Verdict:
    """Return what an answer to a post means, by the contract."""
    match status:
        case 200:
            return "taken"
        case 404:
            return "unknown"
        case 400 | 401 | 413 | 422:
            return "refused"
        case _:
            return "again"


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
        return _verdict(self.status)


@dataclass(slots=True, eq=False)
class Run:
    """One job that runs in the worker."""

    job_id: str
    began: float
    usage: Usage | None
    posts: list[Post] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    stopped: float | None = None
    """When the worker learnt that it has to stop the job."""
    ended: float = float("inf")
    is_open: bool = True
    """Whether its handler runs."""

    @property
    def is_starting(self) -> bool:
        """Whether the job is on its way into the engine."""
        return self.is_open and not self.outputs and not (self.usage and self.usage.has_reached_engine)

    def of(self, route: str, *verdicts: Verdict) -> list[Post]:
        return [post for post in self.posts if post.route == route and (not verdicts or post.verdict in verdicts)]

    @property
    def is_unknown(self) -> bool:
        """Whether the platform has said often enough that it does not know the job."""
        last = self.posts[-UNKNOWN_ANSWERS:]
        return [post.verdict for post in last] == ["unknown"] * UNKNOWN_ANSWERS and last[0].value == last[-1].value

    @property
    def is_answered(self) -> bool:
        """Whether the platform has a result, or has refused to take any."""
        done = self.of("done")
        return bool(done) and (done[-1].verdict == "taken" or "error" in done[-1].value)


class History:
    """Records events, and collects violations of the invariants."""

    def __init__(
        self, plan: Plan, engine: Engine, most: int, pipeline: Pipeline, lines_in_engine: Callable[[], int]
    ) -> None:
        self.plan = plan
        self._batches = plan.batches
        self._stopping = pipeline.lifecycle.stopping
        self._stopped_at = float("inf")
        self.active: set[str] = set()
        """The jobs that run in the worker, by its own account. It adds and removes them."""
        self.changed = asyncio.Event()
        self._engine = engine
        self._lines = engine.lines
        self.violated = engine.lines.violated
        self._runs: list[Run] = []
        self._latest: dict[str, Run] = {}
        self._arrivals: list[tuple[str, float]] = []
        self._most = most
        self._room = pipeline.memory.room
        self._lines_in_engine = lines_in_engine
        self._idle_stop_poll = self._too_many_requests = float("-inf")

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def stops(self) -> None:
        """The worker is stopped."""
        self._stopped_at = min(self._stopped_at, self.now)
        self._stopping.set()

    # ---- The worker's account of its jobs

    def add(self, job_id: str) -> None:
        self.active.add(job_id)
        # One batch runs beside the other jobs.
        if len(self.active) > self._most + bool(self.active & self._batches.keys()):
            self.violated(f"{len(self.active)} jobs for {self._most} places")

    def remove(self, job_id: str) -> None:
        self.active.remove(job_id)
        if run := self._latest.get(job_id):
            run.ended = min(run.ended, self.now)
            if job_id in self._batches:
                is_cancelled = run.stopped is not None and run.ended < self._over
                at = min(run.ended if run.stopped is None else run.stopped, self._over)
                self._lines.run_ended(job_id, at, is_cancelled=is_cancelled)
        self.changed.set()

    def handler(self, handler: Handler) -> Handler:
        """Return a handler that records its jobs."""

        async def recorded(job: Job) -> AsyncGenerator[Output, None]:
            run = Run(job["id"], self.now, current_usage.get())
            self._runs.append(run)
            self._latest[run.job_id] = run
            try:
                async with aclosing(handler(job)) as outputs:
                    async for output in outputs:
                        run.outputs.append(output)
                        yield output
            finally:
                run.is_open = False

        return recorded

    @property
    def begun_batches(self) -> dict[str, BatchPlan]:
        """The batches of which any run began."""
        return {job_id: batch for job_id, batch in self._batches.items() if job_id in self._latest}

    # ---- The platform's account of what it sends and gets

    def arrived(self, job_id: str) -> None:
        """A job has arrived in the worker."""
        self._arrivals.append((job_id, self.now))

    def asked(self, most: int) -> None:
        """The worker asks for jobs."""
        load = self._engine.callers_load()
        starting = sum(run.is_starting for run in self._runs if run.job_id not in self._batches)
        # The worker counts a line until its answer is written, which is a moment after it has left the engine.
        elsewhere = self._lines_in_engine() - self._engine.lines_running_or_waiting
        places = load.capacity + load.capacity // 16 + elsewhere
        if starting + load.requests + most > places:
            self.violated(f"the worker hoards: {starting}, {load.requests} and {most} jobs for {places} places")
        batch = self.plan.settings["job_batch_size"]
        if most > batch or starting + most > 2 * batch:
            self.violated(f"the worker asked for {most} jobs while {starting} are on their way")
        if load.waiting > elsewhere or (load.kv_cache >= 0.9 and not elsewhere):
            self.violated("the worker asked for jobs while its engine is full")
        if most > self._room():
            self.violated("the worker asked for jobs for which there is no memory")
        if self._stopping.is_set() or self._engine.is_dead:
            self.violated("the worker asked for jobs after it was stopped, or its engine died")
        if self.now - self._too_many_requests < TOO_MANY_REQUESTS_SECONDS:
            self.violated("the worker asked for jobs too soon after 429")

    def refused_jobs(self, status: int) -> None:
        """The worker gets an error instead of jobs."""
        if status == 429:
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
        if self._engine.has_requests_of(run.job_id) and self._latest[run.job_id] is run:
            self.violated(f"the engine still has a request of {run.job_id}, which was stopped at {run.stopped:.3f} s")

    def posts(self, job_id: str, route: str, value: dict[str, Any]) -> Post:
        """The worker posts something."""
        post = Post(route, value, self.now)
        if (run := self._latest.get(job_id)) is None:
            self.violated(f"a post for {job_id}, which does not run")
            return post
        if run.stopped is not None and self.now > run.stopped:
            self.violated(f"a post for {job_id}, which was stopped at {run.stopped:.3f} s")
        if run.is_unknown and run.posts[-1].route == "stream":
            self.violated(f"a post for {job_id}, which the platform has forgotten")
        if route == "progress":
            if run.of("done"):
                self.violated(f"a post of the progress of {job_id}, which has ended")
            return post
        self._check_order(run, post)
        run.posts.append(post)
        return post

    def _check_order(self, run: Run, post: Post) -> None:
        if not run.posts:
            return
        last = run.posts[-1]
        if last.value == post.value and last.verdict != "taken":
            if self.now - max(last.answered, self._stopped_at) > LEAVING_SECONDS:
                self.violated(f"{run.job_id} waits too long before its next attempt, while the worker is being stopped")
            return
        if last.route == "done" and last.verdict == "taken":
            self.violated(f"{run.job_id} ends twice: a post after its result")
        if last.verdict == "again" or (last.verdict == "unknown" and not run.is_unknown):
            self.violated(f"{run.job_id} gave up a post that it has to repeat")
        if post.route == "stream" and last.verdict != "taken":
            self.violated(f"a hole: {run.job_id} posts a part after one that was not accepted")

    # ---- At the end

    def check(self) -> None:
        """Check every run and every arrival, once the worker has ended."""
        for job_id, at in self._arrivals:
            if not any(run.job_id == job_id and self._is_answer(run, at) for run in self._runs):
                self.violated(f"{job_id}, which arrived at {at:.3f} s, was dropped")
        for run in self._runs:
            self._check_parts(run)
            if not self._has_ended(run):
                self.violated(f"{run.job_id}, which began at {run.began:.3f} s, has no end")

    @property
    def _over(self) -> float:
        """When the worker was stopped, or its engine died."""
        return min(self._stopped_at, self._engine.died_at)

    def _is_answer(self, run: Run, at: float) -> bool:
        """Return whether a run is the answer to a job that arrived at a time."""
        if run.began >= at or run.ended < at:
            return run.began >= at
        return run.is_answered or run.ended - at >= AGAIN_SECONDS or run.ended >= self._over

    def _has_ended(self, run: Run) -> bool:
        """Return whether a run ended in one of the ways that are allowed."""
        if run.stopped is not None or any(post.verdict == "taken" for post in run.of("done")):
            return True
        is_over = run.ended >= self._over
        if not run.posts:
            may_leave = self.plan.settings["unfinished_jobs"] == "leave" or self._lines.is_kept(run.job_id)
            return is_over and may_leave
        last = run.posts[-1]
        if last.verdict == "refused" or run.is_unknown:
            # Only the refusal of an error is final.
            return "error" in last.value or (run.is_unknown and last.route == "stream")
        # An answer that has not arrived when the worker ends, or for longer than the deadline.
        first = next(post for post in run.posts if post.value == last.value)
        is_late = last.sent - first.sent >= self.plan.settings["delivery_timeout"] - ATTEMPT_SECONDS
        return last.verdict != "taken" and (is_over or is_late)

    def _check_parts(self, run: Run) -> None:
        """The parts are the first ones of the result, all of them unless one was refused, and have no holes."""
        parts = [post.value["output"] for post in run.of("stream", "taken")]
        results = [post.value["output"] for post in run.of("done") if "output" in post.value]
        for result in results:
            if parts != result[: len(parts)]:
                self.violated(f"the parts of {run.job_id} are not the beginning of its result")
            if len(parts) < len(result) and not run.of("stream", "refused"):
                self.violated(f"{run.job_id} has a result with more parts than its stream")
        planned = next(job.work for job in self.plan.jobs if job.job_id == run.job_id)
        has_error = not results or _has_error(results[-1])
        if has_error and self._must_succeed(run, planned):
            self.violated(f"{run.job_id} failed without a reason")
        if isinstance(planned, BatchPlan):
            for result in results:
                self._lines.check_result(planned, result[0])
            return
        numbers = _numbers(results[-1] if results else parts)
        if planned.form == "value":
            if not has_error and numbers != [planned.events]:
                self.violated(f"the result of {run.job_id} is wrong")
            return
        if numbers != list(range(len(numbers))) or len(numbers) > planned.events:
            self.violated(f"the events of {run.job_id} have holes: {numbers}")
        if not has_error and len(numbers) < planned.events:
            self.violated(f"the result of {run.job_id} is incomplete")

    def _must_succeed(self, run: Run, planned: RequestPlan | BatchPlan) -> bool:
        """Return whether nothing has happened that may fail a job."""
        done = run.of("done")
        is_disturbed = any(post.verdict in ("refused", "unknown") for post in run.posts) or run.stopped is not None
        if not done or is_disturbed:
            return False
        if self._lines.is_kept(run.job_id):
            return True
        return done[0].sent < self._over and (isinstance(planned, BatchPlan) or not self._may_fail(run, planned))

    def _may_fail(self, run: Run, planned: RequestPlan) -> bool:
        """Return whether a request may fail."""
        # A job that runs again does not wait for memory.
        is_again = next(each for each in self._runs if each.job_id == run.job_id) is not run
        is_short_of_memory = is_again and self._room() < 2
        is_limited = self.plan.settings["request_timeout"] is not None
        return is_limited or is_short_of_memory or planned.ending != "complete" or planned.form == "invalid"


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
