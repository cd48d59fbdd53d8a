"""One job: the client's request, its status and result, and the chunks that the worker has streamed."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeAlias

from .signals import Signal

Json: TypeAlias = Any


class Status(StrEnum):
    """The states of a job, spelled as in RunPod's API."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"


UNFINISHED = frozenset({Status.IN_QUEUE, Status.IN_PROGRESS})


@dataclass(slots=True, eq=False)
class Job:
    """Times are in seconds of `Platform.now`."""

    id: str
    request: Mapping[str, Json]
    """The client's request: `input`, and other keys such as `webhook` and `policy`."""
    created: float
    taken: float | None = None
    done: float | None = None
    status: Status = Status.IN_QUEUE
    worker: str | None = None
    output: Json = None
    error: Json = None
    chunks: list[Json] = field(default_factory=list)
    changed: Signal = field(default_factory=Signal)
    timer: asyncio.TimerHandle | None = None
    """The current deadline: the time to live while the job is queued, then the execution timeout."""
    _read_count: int = 0

    @property
    def ended(self) -> bool:
        return self.status not in UNFINISHED

    def policy_seconds(self, name: str) -> float | None:
        """A time limit from the request's `policy`, which is in milliseconds."""
        policy = self.request.get("policy")
        value = policy.get(name) if isinstance(policy, Mapping) else None
        return value / 1000 if isinstance(value, int | float) else None

    def begin(self, worker: str, now: float) -> None:
        self.status, self.worker, self.taken = Status.IN_PROGRESS, worker, now
        self.changed.fire()

    def reset(self) -> None:
        """Return to the state before a worker took the job."""
        self.status, self.worker, self.taken, self.done = Status.IN_QUEUE, None, None, None
        self.output = self.error = None
        self.chunks, self._read_count = [], 0
        self.changed.fire()

    def add_chunk(self, output: Json) -> None:
        self.chunks.append(output)
        self.changed.fire()

    def end(self, status: Status, now: float, output: Json = None, error: Json = None) -> None:
        self.status, self.done, self.output, self.error = status, now, output, error
        self.changed.fire()

    def read_unread(self) -> list[Json]:
        """The chunks that no earlier call has returned. Independent of `follow`."""
        start, self._read_count = self._read_count, len(self.chunks)
        return self.chunks[start:]

    @property
    def has_unread(self) -> bool:
        return self._read_count < len(self.chunks)

    async def follow(self) -> AsyncIterator[Json]:
        """Yield every chunk from the first one on, as soon as it arrives, until the job ends."""
        position = 0
        while True:
            while position < len(self.chunks):
                yield self.chunks[position]
                position += 1
            if self.ended:
                return
            await self.changed.wait()

    def for_worker(self, *, drop_empty_input: bool) -> dict[str, Json]:
        """The JSON object that job-take returns."""
        payload = {**self.request, "id": self.id}
        if drop_empty_input and payload.get("input") == {}:
            del payload["input"]
        return payload

    def report(self) -> dict[str, Json]:
        """The body of `/status`, and of `/runsync` once the job has ended."""
        body: dict[str, Json] = {"id": self.id, "status": self.status}
        if self.taken is not None:
            body["delayTime"] = milliseconds(self.created, self.taken)
            if self.done is not None:
                body["executionTime"] = milliseconds(self.taken, self.done)
        if self.output is not None:
            body["output"] = self.output
        if self.error is not None:
            body["error"] = self.error
        return body


def milliseconds(start: float, end: float) -> int:
    return round((end - start) * 1000)
