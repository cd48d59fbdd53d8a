"""One job: what the client asked, what became of it, and the chunks that the worker has streamed."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeAlias

from .signals import Signal

Json: TypeAlias = Any


class Status(StrEnum):
    """The states of a job, as the platform spells them."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"


UNFINISHED = frozenset({Status.IN_QUEUE, Status.IN_PROGRESS})


@dataclass(slots=True, eq=False)
class Job:
    """Times are seconds of the platform's clock."""

    id: str
    request: Mapping[str, Json]
    """The client's request: `input` and whatever else it sent (`webhook`, `policy`…)."""
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
    """The deadline that runs at the moment: in the queue the time to live, then the execution timeout."""
    _drained: int = 0

    @property
    def ended(self) -> bool:
        return self.status not in UNFINISHED

    def policy_seconds(self, name: str) -> float | None:
        """An entry of the request's `policy`, which counts in milliseconds."""
        policy = self.request.get("policy")
        value = policy.get(name) if isinstance(policy, Mapping) else None
        return value / 1000 if isinstance(value, int | float) else None

    def begin(self, worker: str, now: float) -> None:
        self.status, self.worker, self.taken = Status.IN_PROGRESS, worker, now
        self.changed.fire()

    def back_to_queue(self) -> None:
        self.status, self.worker, self.taken, self.done = Status.IN_QUEUE, None, None, None
        self.output = self.error = None
        self.chunks, self._drained = [], 0
        self.changed.fire()

    def add_chunk(self, output: Json) -> None:
        self.chunks.append(output)
        self.changed.fire()

    def end(self, status: Status, now: float, output: Json = None, error: Json = None) -> None:
        self.status, self.done, self.output, self.error = status, now, output, error
        self.changed.fire()

    def drain(self) -> list[Json]:
        """The chunks that have not been read this way before. `follow` reads independently of it."""
        start, self._drained = self._drained, len(self.chunks)
        return self.chunks[start:]

    @property
    def has_undrained(self) -> bool:
        return self._drained < len(self.chunks)

    async def follow(self) -> AsyncIterator[Json]:
        """Every chunk from the first one on, each as soon as it arrives, until the job ends."""
        position = 0
        while True:
            while position < len(self.chunks):
                yield self.chunks[position]
                position += 1
            if self.ended:
                return
            await self.changed.wait()

    def for_worker(self, *, drop_empty_input: bool) -> dict[str, Json]:
        """The object that a job-take hands out."""
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
