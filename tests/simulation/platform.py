"""A platform that follows a plan: a transport without sockets that does everything that the contract allows."""

import asyncio
import json
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from tests.simulation.history import History
from tests.simulation.plan import JobPlan, Plan
from worker import race
from worker.queue.transport import Answer, NoAnswerError

T = TypeVar("T")

HOLD_SECONDS = 20.0
RETRY_SECONDS = 40.0
"""After which a job is queued again whose answer was lost on its way to the worker."""
PASSING = (408, 429, 500, 502, 503)
REFUSED = (400, 401, 413, 422)

State = Literal["new", "queued", "given", "ended", "forgotten"]


@dataclass(slots=True)
class _Job:
    plan: JobPlan
    state: State = "new"


class SimulatedPlatform:
    """One endpoint with one worker. Everything random comes from the plan's seed."""

    def __init__(self, plan: Plan, history: History) -> None:
        self._plan = plan
        self._history = history
        self._rng = random.Random(plan.seed + 1)
        self._loop = asyncio.get_running_loop()
        self._jobs = {job.job_id: _Job(job) for job in plan.jobs}
        self._queue: deque[_Job] = deque()
        self._stops: list[str] = []
        self._named: list[str] = []
        self._moved = asyncio.Event()
        self._open: set[asyncio.Future[None]] = set()
        self._pending = 0
        """Changes of jobs that are planned and have not happened, and jobs on their way to the worker."""
        for job in self._jobs.values():
            self._plan_job(job)

    @property
    def is_settled(self) -> bool:
        """Whether every job has been taken, and nothing more will happen to any."""
        return not self._pending and not self._queue

    # ---- What happens to jobs

    def _plan_job(self, job: _Job) -> None:
        plan = job.plan
        self._at(plan.at, self._enqueue, job)
        if plan.stop_at is not None:
            self._at(plan.stop_at, self._stop, job)
        if plan.repeat_at is not None:
            self._at(plan.repeat_at, self._enqueue, job)
        if plan.forget_at is not None:
            self._at(plan.forget_at, self._forget, job)

    def _at(self, when: float, change: Callable[..., None], *args: Any) -> None:
        self._pending += 1

        def happen() -> None:
            self._pending -= 1
            change(*args)
            self._history.changed.set()

        self._loop.call_at(when, happen)

    def _enqueue(self, job: _Job) -> None:
        if job.state == "forgotten":
            return
        if job not in self._queue:
            self._queue.append(job)
        job.state = "queued"
        self._moved.set()

    def _stop(self, job: _Job) -> None:
        if job.state == "given":
            self._stops.append(job.plan.job_id)
            self._moved.set()
        elif job.state == "queued":
            self._queue.remove(job)
        job.state = "ended"
        if job.plan.again_after is not None:
            self._at(self._loop.time() + job.plan.again_after, self._enqueue, job)

    def _forget(self, job: _Job) -> None:
        if job.state == "queued":
            self._queue.remove(job)
        job.state = "forgotten"

    # ---- The network

    def reset(self) -> None:
        """Break every connection."""
        for waiting in list(self._open):
            if not waiting.done():
                waiting.set_exception(NoAnswerError("reset"))

    @property
    def _is_away(self) -> bool:
        now = self._loop.time()
        return any(start <= now < start + length for start, length in self._plan.outages)

    async def _travel(self, most: float) -> None:
        """Wait while a request or an answer is on its way. Raises `NoAnswerError` if the connection breaks."""
        if self._is_away:
            await asyncio.sleep(self._rng.choice((0.0, 0.0, 0.3)))
            raise NoAnswerError("away")
        arrived = self._loop.create_future()
        self._open.add(arrived)
        timer = self._loop.call_later(self._rng.uniform(0, most), _set, arrived)
        try:
            await arrived
        finally:
            timer.cancel()
            self._open.discard(arrived)

    def _chance(self, probability: float) -> bool:
        return probability > 0 and self._rng.random() < probability

    async def _ask(self, handle: Callable[[], T]) -> T:
        """Send a request, have it handled, and return the answer."""
        most = self._plan.latency
        if self._chance(self._plan.late):
            if self._chance(0.5):
                most = 5.0
            else:
                # The client loses its connection first; the platform handles the request later.
                self._loop.call_later(self._rng.uniform(0, 5), handle)
                await self._travel(most)
                raise NoAnswerError("lost on its way")
        await self._travel(most)
        if self._chance(self._plan.fails / 3):
            raise NoAnswerError("reset before it was handled")
        answer = handle()
        if self._chance(self._plan.fails / 3):
            raise NoAnswerError("reset before the answer")
        await self._travel(most)
        return answer

    # ---- Posts

    async def post(self, url: str, _headers: Mapping[str, str], body: bytes) -> int:
        """See `Transport`."""
        route, _, rest = url.partition("/")
        job_id, value = rest.partition("?")[0], json.loads(body)
        route = "progress" if route == "done" and url.endswith("&isStream=false") else route
        post = self._history.posts(job_id, route, value)
        try:
            post.status = await self._ask(lambda: self._posted(self._jobs[job_id], route))
        finally:
            post.answered = self._loop.time()
        return post.status

    def _posted(self, job: _Job, route: str) -> int:
        if self._chance(self._plan.fails / 3):
            return self._rng.choice(PASSING)
        if job.state == "forgotten" or self._chance(self._plan.unknown):
            return 404
        if job.state == "ended":
            return self._plan.status_after_end
        if self._chance(self._plan.refuses):
            return self._rng.choice(REFUSED)
        if route == "done":
            if job in self._queue:
                self._queue.remove(job)
            job.state = "ended"
            self._history.changed.set()
        return 200

    # ---- Long polls

    async def get(self, url: str, stopping: asyncio.Event | None = None) -> Answer | None:
        """See `Transport`."""
        if url.startswith("stop"):
            return await self._listen()
        batch = int(url.partition("batch_size=")[2].partition("&")[0] or 1)
        self._history.asked(batch)
        given: list[_Job] = []
        assert stopping is not None
        taking = asyncio.ensure_future(self._take(batch, given))
        try:
            if await race.first(taking, stopping.wait()) is not taking:
                self._lose(given)
                return None
            answer = taking.result()
            # The body follows its head.
            await self._travel(self._plan.latency)
        except NoAnswerError:
            self._lose(given)
            raise
        except asyncio.CancelledError:
            self._history.violated("the worker gave up jobs that were arriving")
            raise
        finally:
            await race.end(taking)
        self._history.refused_jobs(answer.status)
        self._pending -= len(given)
        for job in given:
            self._history.arrived(job.plan.job_id)
        return answer

    async def _take(self, batch: int, given: list[_Job]) -> Answer:
        await self._travel(self._plan.latency)
        if self._chance(self._plan.fails / 2):
            return Answer(self._rng.choice(PASSING), b"<html>")
        if not self._queue:
            await self._until(lambda: bool(self._queue))
        while self._queue and len(given) < batch:
            given.append(job := self._queue.popleft())
            job.state = "given"
            self._pending += 1
        await self._travel(self._plan.latency)
        if not given:
            return Answer(self._rng.choice((200, 204, 400)))
        jobs = [{"id": job.plan.job_id, "input": job.plan.work.input} for job in given]
        return Answer(200, json.dumps(jobs if batch > 1 else jobs[0]).encode())

    def _lose(self, given: list[_Job]) -> None:
        """Jobs that the worker never got come back to the queue."""
        self._pending -= len(given)
        for job in given:
            self._at(self._loop.time() + RETRY_SECONDS, self._give_back, job)

    def _give_back(self, job: _Job) -> None:
        if job.state == "given":
            self._enqueue(job)

    async def _listen(self) -> Answer:
        self._history.listens()
        asked = self._loop.time()
        await self._travel(self._plan.latency)
        if self._chance(self._plan.fails / 2):
            return Answer(self._rng.choice(PASSING))
        if not (self._plan.repeats_stops and self._named):
            await self._until(lambda: bool(self._stops))
        named, self._stops = self._stops, []
        self._named += named
        await self._travel(self._plan.latency)
        if self._chance(self._plan.late):
            await self._travel(5.0)
        ids = self._named if self._plan.repeats_stops else named
        self._history.heard(ids, asked)
        return Answer(200, json.dumps({"jobsToStop": ids}).encode()) if ids else Answer(204)

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Hold a request until a condition is true, or for some time. Its connection may break meanwhile."""
        holding = self._loop.create_future()
        self._open.add(holding)
        timer = self._loop.call_later(HOLD_SECONDS, _set, holding)
        try:
            while not condition() and not holding.done():
                self._moved.clear()
                await race.first(holding, self._moved.wait())
            if holding.done():
                holding.result()
        finally:
            timer.cancel()
            holding.cancel()
            self._open.discard(holding)


def _set(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
