"""What happens in one schedule: jobs, settings and faults, all drawn from a seed. Times are in virtual seconds."""

import math
import random
from dataclasses import dataclass, replace
from typing import Any, Literal

Form = Literal["sse", "objects", "value", "invalid"]
Ending = Literal["complete", "error", "exception", "silent"]

BATCH_SHARE = 0.1
"""The share of schedules with batches."""


def job_of(name: str) -> str:
    """Return the job of a request: `job-1` for `job-1` and for its line `job-1/2`."""
    return name.partition("/")[0]


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """One request, and what the engine does with it."""

    name: str
    """The job's id. For a line of a batch, the job's id and the line's number: `job-1/2`."""
    form: Form
    """`invalid`: it never reaches the engine."""
    prepare: float
    """Seconds before the request reaches the engine, as for fetching an image."""
    events: int
    gap: float
    """Seconds between two events of the engine."""
    ending: Ending
    requests: int
    """How many requests of the engine it needs."""
    is_deaf: bool
    """Whether the engine does not notice that its client leaves, until it is cancelled."""

    @property
    def input(self) -> dict[str, Any]:
        body = {"prompt": "x", "stream": self.form != "value"}
        match self.form:
            case "sse":
                return {"openai_route": "/v1/completions", "openai_input": body}
            case "invalid":
                return {"nothing": 1}
            case _:
                return body

    @property
    def line(self) -> dict[str, Any]:
        """The request as a line of a batch. Its prompt tells the engine which one it is."""
        url = "/v1/nothing" if self.form == "invalid" else "/v1/completions"
        return {"custom_id": self.name, "method": "POST", "url": url, "body": {"prompt": self.name}}


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """A batch."""

    name: str
    """The job's id."""
    lines: tuple[RequestPlan, ...]
    is_file: bool
    """Whether the input is a file on the volume, and not a list in the job."""
    has_path: bool
    """Whether the caller names the path of the output."""
    order: Literal["input", "ended"]

    @property
    def input(self) -> dict[str, Any]:
        batch: dict[str, Any] = {"order": self.order}
        batch["input"] = f"{self.name}.in" if self.is_file else [line.line for line in self.lines]
        if self.has_path:
            batch["output"] = f"{self.name}.jsonl"
        return {"batch": batch}


@dataclass(frozen=True, slots=True)
class JobPlan:
    """One job, and what the platform does with it."""

    job_id: str
    at: float
    """When a client submits it."""
    work: RequestPlan | BatchPlan
    stop_at: float | None
    """When the platform stops it."""
    again_after: float | None
    """Seconds after the stop at which it is queued again."""
    repeat_at: float | None
    """When the platform gives it out once more, although it may run."""
    forget_at: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """One schedule."""

    seed: int
    jobs: tuple[JobPlan, ...]
    # The worker.
    settings: dict[str, Any]
    capacity: int
    """Requests that the engine runs at once."""
    kv_cache: float
    """The share of the KV cache that each of them takes."""
    dies_at: float | None
    stopped_at: float | None
    """When the worker gets SIGTERM."""
    # The platform and the network.
    latency: float
    """The longest usual way of a request, and of its answer."""
    fails: float
    """The chance that a request fails in a way that may pass: no answer, 429, 5xx."""
    refuses: float
    """The chance that a post is refused for good."""
    unknown: float
    """The chance that a post is answered with 404."""
    late: float
    """The chance that a request takes seconds, or is handled after its client has given up."""
    status_after_end: int
    """The answer to posts for a job that has ended."""
    repeats_stops: bool
    resets: tuple[float, ...]
    """When all connections break."""
    outages: tuple[tuple[float, float], ...]
    """Start and length of the times when the platform cannot be reached."""
    freezes: tuple[tuple[float, float], ...]
    """When the worker is frozen, and for how long."""
    has_volume: bool = False

    @property
    def requests(self) -> list[RequestPlan]:
        """Every request to the engine, lines of batches included."""
        works = [job.work for job in self.jobs]
        return [each for work in works for each in (work.lines if isinstance(work, BatchPlan) else (work,))]

    @property
    def batches(self) -> dict[str, BatchPlan]:
        """The batches by the ids of their jobs."""
        return {job.job_id: job.work for job in self.jobs if isinstance(job.work, BatchPlan)}

    @property
    def horizon(self) -> float:
        """A time at which everything must be over."""
        away = sum(length for _, length in (*self.outages, *self.freezes))
        return away + 2 * float(self.settings["delivery_timeout"]) + 2000


class _Dice(random.Random):
    """Draws a plan."""

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def sometimes(self, probability: float, value: float) -> float | None:
        return value if self.random() < probability else None

    def between(self, shortest: float, longest: float) -> float:
        """Return a length whose order of magnitude is random."""
        return math.exp(self.uniform(math.log(shortest), math.log(longest)))


def plan_of(seed: int) -> Plan:
    """Return the schedule of a seed."""
    dice = _Dice(seed)
    span = dice.choice((0.0, 1.0, 5.0))
    request_timeout = dice.sometimes(0.3, dice.between(0.1, 60))
    is_calm = dice.chance(0.3)
    jobs = [_job(dice, f"job-{number}", span) for number in range(dice.choice((1, 1, 2, 3, 4, 8)))]
    is_silent = any(isinstance(job.work, RequestPlan) and job.work.ending == "silent" for job in jobs)
    may_hang = request_timeout is None and is_silent
    plan = Plan(
        seed=seed,
        jobs=tuple(jobs),
        settings={
            "worker_mode": "queue",
            "request_timeout": request_timeout,
            "drain_seconds": dice.choice((0.0, 0.5, 2.5, 20.0)),
            "unfinished_jobs": dice.choice(("fail", "leave")),
            "delivery_timeout": dice.choice((30.0, 900.0)),
            "max_concurrency": dice.choice((None, 1, 2, 8)),
            "job_batch_size": dice.choice((1, 2, 16)),
            "max_total_request_bytes": dice.choice((20_000_000, 40_000_000, 1 << 30)),
        },
        capacity=dice.choice((1, 2, 3, 16)),
        kv_cache=dice.choice((0.0, 0.0, 0.05, 0.3)),
        dies_at=dice.sometimes(0.1, dice.between(0.001, 10)),
        stopped_at=dice.between(0.001, 20) if may_hang or dice.chance(0.3) else None,
        latency=dice.choice((0.0, 0.001, 0.05)),
        fails=0.0 if is_calm else dice.choice((0.0, 0.05, 0.3)),
        refuses=0.0 if is_calm else dice.choice((0.0, 0.0, 0.05)),
        unknown=0.0 if is_calm else dice.choice((0.0, 0.0, 0.05)),
        late=0.0 if is_calm else dice.choice((0.0, 0.1)),
        status_after_end=dice.choice((200, 200, 400, 404)),
        repeats_stops=dice.chance(0.2),
        resets=() if is_calm else tuple(dice.uniform(0, 10) for _ in range(dice.choice((0, 0, 1, 3)))),
        outages=() if is_calm or dice.chance(0.7) else ((dice.uniform(0, 5), dice.between(0.001, 10_000)),),
        freezes=() if dice.chance(0.85) else ((dice.uniform(0, 5), dice.between(0.1, 100_000)),),
    )
    # Drawn last, so that a schedule without batches does not depend on them.
    return _with_batches(dice, plan, span) if dice.chance(BATCH_SHARE) else plan


def _job(dice: _Dice, job_id: str, span: float) -> JobPlan:
    at = dice.uniform(0, span)
    stop_at = dice.sometimes(0.2, at + dice.between(0.001, 10))
    return JobPlan(
        job_id=job_id,
        at=at,
        work=_request(dice, job_id),
        stop_at=stop_at,
        again_after=dice.sometimes(0.5, dice.between(0.0001, 1)) if stop_at else None,
        repeat_at=dice.sometimes(0.1, at + dice.between(0.001, 5)),
        forget_at=dice.sometimes(0.05, at + dice.between(0.001, 5)),
    )


def _request(dice: _Dice, name: str) -> RequestPlan:
    return RequestPlan(
        name=name,
        form=dice.choices(("sse", "objects", "value", "invalid"), (5, 5, 4, 1))[0],
        prepare=dice.sometimes(0.3, dice.between(0.001, 3)) or 0.0,
        events=dice.choice((0, 1, 2, 3, 5, 8)),
        gap=dice.between(0.001, 1),
        ending=dice.choices(("complete", "error", "exception", "silent"), (12, 1, 1, 1))[0],
        requests=dice.choice((1, 1, 1, 3)),
        is_deaf=dice.chance(0.2),
    )


def _with_batches(dice: _Dice, plan: Plan, span: float) -> Plan:
    """Return the plan with one or two batches more."""
    has_volume, may_hang = dice.chance(0.7), plan.settings["request_timeout"] is not None
    batches = []
    for number in range(dice.choice((1, 1, 2))):
        at = dice.uniform(0, span)
        stop_at = dice.sometimes(0.4, at + dice.between(0.01, 20))
        batches.append(
            JobPlan(
                job_id=f"batch-{number}",
                at=at,
                work=_batch(dice, f"batch-{number}", has_volume, may_hang),
                stop_at=stop_at,
                again_after=dice.sometimes(0.7, dice.between(0.0001, 10)) if stop_at else None,
                repeat_at=dice.sometimes(0.2, at + dice.between(0.001, 20)),
                forget_at=dice.sometimes(0.05, at + dice.between(0.001, 5)),
            )
        )
    return replace(plan, jobs=(*plan.jobs, *batches), has_volume=has_volume)


def _batch(dice: _Dice, name: str, has_volume: bool, may_hang: bool) -> BatchPlan:
    count = dice.choice((1, 2, 4, 8))
    return BatchPlan(
        name=name,
        lines=tuple(_line(dice, f"{name}/{number}", may_hang) for number in range(1, count + 1)),
        is_file=has_volume and dice.chance(0.5),
        has_path=has_volume and dice.chance(0.7),
        order=dice.choice(("input", "ended")),
    )


def _line(dice: _Dice, name: str, may_hang: bool) -> RequestPlan:
    line = _request(dice, name)
    ending = "complete" if line.ending == "silent" and not may_hang else line.ending
    return replace(line, form="invalid" if line.form == "invalid" else "value", ending=ending)
