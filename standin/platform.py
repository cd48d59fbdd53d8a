"""The state of one endpoint: its jobs, its queue and the workers that wait for jobs. No HTTP, no polling.

Call all methods in one event loop. If a worker is waiting for a job, `submit` assigns the job to it before it returns.
"""

import asyncio
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .behaviour import Behaviour, RouteKind
from .jobs import Job, Json, Status
from .records import Ping, Records, Take
from .signals import Mailbox, Signal


class UnknownJobError(Exception):
    """No job has this id. The message is the id."""


@dataclass(slots=True, eq=False)
class _WaitingTake:
    take: Take
    jobs: asyncio.Future[list[Job]]


class Platform:
    """One endpoint."""

    def __init__(self, behaviour: Behaviour | None = None, endpoint: str = "local") -> None:
        self.behaviour = behaviour or Behaviour()
        self.endpoint = endpoint
        self.jobs: dict[str, Job] = {}
        self.forgotten: set[str] = set()
        """Ids of jobs that `forget` removed. Posts for them raise `UnknownJobError`."""
        self.queue: deque[Job] = deque()
        self.records = Records()
        self.retried = 0
        self._waiting_takes: deque[_WaitingTake] = deque()
        self._stop_mailboxes: dict[str, Mailbox[str]] = {}
        self._changed = Signal()

    @staticmethod
    def now() -> float:
        return time.monotonic()

    async def until(self, condition: Callable[["Platform"], bool]) -> None:
        """Wait until `condition` holds. It is evaluated now and after each change on the platform."""
        await self._changed.until(lambda: condition(self))

    # ---- Requests of clients

    def find(self, job_id: str) -> Job:
        try:
            return self.jobs[job_id]
        except KeyError:
            raise UnknownJobError(job_id) from None

    def submit(self, request: Mapping[str, Json], *, sync: bool = False) -> Job:
        job = Job(f"{'sync-' if sync else ''}{uuid.uuid4()}-u1", request, created=self.now())
        self.jobs[job.id] = job
        self._enqueue(job)
        return job

    def cancel(self, job: Job) -> None:
        """Cancel the job if it has not ended. The worker that runs it gets its id from job-stop."""
        self._interrupt(job, Status.CANCELLED)

    def retry(self, job: Job) -> None:
        """Queue the job again if it failed or timed out."""
        if job.status in (Status.FAILED, Status.TIMED_OUT):
            self.retried += 1
            self.give_again(job)

    def purge(self) -> int:
        """Cancel all queued jobs and return their number."""
        queued = [job for job in self.queue if job.status is Status.IN_QUEUE]
        for job in queued:
            self.cancel(job)
        return len(queued)

    def health(self) -> dict[str, dict[str, int]]:
        status = Counter(job.status for job in self.jobs.values())
        running = {job.worker for job in self.jobs.values() if job.status is Status.IN_PROGRESS}
        ready = self.ready_workers()
        pinging = {ping.worker for ping in self.records.pings}
        return {
            "jobs": {
                "completed": status[Status.COMPLETED],
                "failed": status[Status.FAILED] + status[Status.TIMED_OUT],
                "inProgress": status[Status.IN_PROGRESS],
                "inQueue": status[Status.IN_QUEUE],
                "retried": self.retried,
            },
            "workers": {
                "idle": len(ready - running),
                "initializing": len(pinging - ready),
                "ready": len(ready),
                "running": len(running),
                "throttled": 0,
                "unhealthy": 0,
            },
        }

    def waiting_workers(self) -> set[str]:
        """The workers that wait for a job now."""
        return {waiting.take.worker for waiting in self._waiting_takes}

    def ready_workers(self) -> set[str]:
        """The workers that have asked for a job."""
        return {take.worker for take in self.records.takes}

    # ---- For tests

    def jobs_per_worker(self) -> Counter[str]:
        """The number of jobs that each worker has taken. A job that was given again counts for its last worker."""
        return Counter(job.worker for job in self.jobs.values() if job.worker is not None)

    def give_again(self, job: Job) -> None:
        """Queue a running or ended job again. A worker that still runs it gets no stop signal."""
        if job.status is not Status.IN_QUEUE:
            self._clear_deadline(job)
            job.reset()
            self._enqueue(job)

    def forget(self, job: Job) -> None:
        """Remove the job. A worker that runs it gets no stop signal. Clients that wait for it see it cancelled."""
        del self.jobs[job.id]
        self.forgotten.add(job.id)
        if job.status is Status.IN_QUEUE:
            self.queue.remove(job)
        if not job.ended:
            self._end(job, Status.CANCELLED)

    # ---- Requests of workers

    def requested(self, kind: RouteKind) -> None:
        """Record the arrival of a request, before its faults."""
        self.records.requests[kind].append(self.now())
        self._changed.fire()

    async def take(self, take: Take, *, duplicate: bool = False) -> list[Job]:
        """Return up to `take.batch_size` jobs as soon as one is queued, or an empty list after `take_hold` seconds.

        With `duplicate`, the jobs are queued a second time, as by a platform with at-least-once delivery.
        """
        self.records.takes.append(take)
        self._changed.fire()
        waiting = _WaitingTake(take, asyncio.get_running_loop().create_future())
        self._waiting_takes.append(waiting)
        self._dispatch()
        try:
            # asyncio.timeout would cancel the future, and lose jobs that are assigned just as the time runs out.
            await asyncio.wait({waiting.jobs}, timeout=self.behaviour.take_hold)
        except asyncio.CancelledError:
            self._return_to_queue(waiting)
            raise
        finally:
            if not waiting.jobs.done():
                self._waiting_takes.remove(waiting)
        jobs = waiting.jobs.result() if waiting.jobs.done() else []
        if duplicate:
            self.queue.extend(jobs)
            self._dispatch()
        return jobs

    async def stop_signals(self, worker: str) -> list[str]:
        """Return the ids of jobs that the worker must stop, or an empty list after `stop_hold` seconds."""
        mailbox = self._stop_mailbox(worker)
        job_ids = await mailbox.collect(self.behaviour.stop_hold)
        self.records.stop_signals.extend(job_ids)
        if self.behaviour.repeat_stops:
            for job_id in job_ids:
                mailbox.put(job_id)
        self._changed.fire()
        return job_ids

    def post_chunk(self, job_id: str, output: Json) -> None:
        self.records.stream_posts += 1
        job = self._unfinished(job_id)
        if job is None:
            self.records.late_streams.append(job_id)
            return
        job.add_chunk(output)
        self._changed.fire()

    def post_result(self, job_id: str, result: Mapping[str, Json]) -> None:
        if result.get("status") == Status.IN_PROGRESS:
            self._post_progress(job_id, result.get("output"))
            return
        self.records.done_posts += 1
        self.records.refreshes += bool(result.get("stopPod"))
        job = self._unfinished(job_id)
        if job is None:
            self.records.duplicate_dones.append(job_id)
            self._changed.fire()
            return
        error = result.get("error")
        self._end(job, Status.FAILED if error else Status.COMPLETED, result.get("output"), error)

    def _post_progress(self, job_id: str, progress: Json) -> None:
        """`/status` shows it as the output until the job ends. The SDK's `progress_update` sends it."""
        self.records.progress_posts += 1
        if job := self._unfinished(job_id):
            job.output = progress
            self._changed.fire()

    def ping(self, ping: Ping) -> None:
        self.records.pings.append(ping)
        self._changed.fire()

    def _unfinished(self, job_id: str) -> Job | None:
        if job_id in self.forgotten:
            self._changed.fire()
            raise UnknownJobError(job_id)
        job = self.jobs.get(job_id)
        return None if job is None or job.ended else job

    # ---- Transitions of jobs

    def _enqueue(self, job: Job) -> None:
        lifetime = job.policy_seconds("ttl")
        if lifetime is not None:
            self._set_deadline(job, lifetime)
        self.queue.append(job)
        self._dispatch()
        self._changed.fire()

    def _dispatch(self) -> None:
        while self.queue and self._waiting_takes:
            waiting = self._waiting_takes.popleft()
            count = min(len(self.queue), waiting.take.batch_size)
            waiting.jobs.set_result([self._start(self.queue.popleft(), waiting.take.worker) for _ in range(count)])

    def _start(self, job: Job, worker: str) -> Job:
        # A duplicate delivery does not change the job.
        if job.status is Status.IN_QUEUE:
            job.begin(worker, self.now())
            limit = job.policy_seconds("executionTimeout")
            self._set_deadline(job, self.behaviour.execution_timeout if limit is None else limit)
        return job

    def _return_to_queue(self, waiting: _WaitingTake) -> None:
        """Queue jobs again that were assigned to a worker just as it disconnected."""
        if not waiting.jobs.done():
            return
        for job in reversed(waiting.jobs.result()):
            job.reset()
            self.queue.appendleft(job)
        self._dispatch()

    def _set_deadline(self, job: Job, seconds: float) -> None:
        self._clear_deadline(job)
        job.timer = asyncio.get_running_loop().call_later(seconds, self._interrupt, job, Status.TIMED_OUT)

    @staticmethod
    def _clear_deadline(job: Job) -> None:
        if job.timer is not None:
            job.timer.cancel()
            job.timer = None

    def _interrupt(self, job: Job, status: Status) -> None:
        if job.ended:
            return
        if job.status is Status.IN_QUEUE:
            self.queue.remove(job)
        elif job.worker is not None:
            self._stop_mailbox(job.worker).put(job.id)
        self._end(job, status)

    def _end(self, job: Job, status: Status, output: Json = None, error: Json = None) -> None:
        self._clear_deadline(job)
        job.end(status, self.now(), output, error)
        self._changed.fire()

    def _stop_mailbox(self, worker: str) -> Mailbox[str]:
        return self._stop_mailboxes.setdefault(worker, Mailbox())
