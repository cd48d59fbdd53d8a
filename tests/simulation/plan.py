"""What happens in one schedule: jobs, settings and faults, all drawn from a seed. Times are in virtual seconds."""

import math
import random
from dataclasses import dataclass
from typing import Any, Literal

Form = Literal["sse", "objects", "value", "invalid"]
Ending = Literal["complete", "error", "exception", "silent"]


@dataclass(frozen=True, slots=True)
class JobPlan:
    """One job, and what the engine does with it."""

    job_id: str
    at: float
    """When a client submits it."""
    form: Form
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
    stop_at: float | None
    """When the platform stops it."""
    again_after: float | None
    """Seconds after the stop at which it is queued again."""
    repeat_at: float | None
    """When the platform gives it out once more, although it may run."""
    forget_at: float | None

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

    @property
    def horizon(self) -> float:
        """A time at which everything must be over."""
        away = sum(length for _, length in (*self.outages, *self.freezes))
        return away + 2 * float(self.settings["delivery_timeout"]) + 2000


def plan_of(seed: int) -> Plan:
    """Return the schedule of a seed."""
    rng = random.Random(seed)
    span = rng.choice((0.0, 1.0, 5.0))

    def chance(probability: float) -> bool:
        return rng.random() < probability

    def sometimes(probability: float, value: float) -> float | None:
        return value if rng.random() < probability else None

    def between(shortest: float, longest: float) -> float:
        """A length whose order of magnitude is random."""
        return math.exp(rng.uniform(math.log(shortest), math.log(longest)))

    request_timeout = sometimes(0.3, between(0.1, 60))
    is_calm = chance(0.3)
    jobs = []
    for number in range(rng.choice((1, 1, 2, 3, 4, 8))):
        at = rng.uniform(0, span)
        stop_at = sometimes(0.2, at + between(0.001, 10))
        jobs.append(
            JobPlan(
                job_id=f"job-{number}",
                at=at,
                form=rng.choices(("sse", "objects", "value", "invalid"), (5, 5, 4, 1))[0],
                prepare=sometimes(0.3, between(0.001, 3)) or 0.0,
                events=rng.choice((0, 1, 2, 3, 5, 8)),
                gap=between(0.001, 1),
                ending=rng.choices(("complete", "error", "exception", "silent"), (12, 1, 1, 1))[0],
                requests=rng.choice((1, 1, 1, 3)),
                is_deaf=chance(0.2),
                stop_at=stop_at,
                again_after=sometimes(0.5, between(0.0001, 1)) if stop_at else None,
                repeat_at=sometimes(0.1, at + between(0.001, 5)),
                forget_at=sometimes(0.05, at + between(0.001, 5)),
            )
        )
    may_hang = request_timeout is None and any(job.ending == "silent" for job in jobs)
    return Plan(
        seed=seed,
        jobs=tuple(jobs),
        settings={
            "worker_mode": "queue",
            "request_timeout": request_timeout,
            "drain_seconds": rng.choice((0.0, 0.5, 2.5, 20.0)),
            "unfinished_jobs": rng.choice(("fail", "leave")),
            "delivery_timeout": rng.choice((30.0, 900.0)),
            "max_concurrency": rng.choice((None, 1, 2, 8)),
            "job_batch_size": rng.choice((1, 2, 16)),
            "max_total_request_bytes": rng.choice((20_000_000, 40_000_000, 1 << 30)),
        },
        capacity=rng.choice((1, 2, 3, 16)),
        kv_cache=rng.choice((0.0, 0.0, 0.05, 0.3)),
        dies_at=sometimes(0.1, between(0.001, 10)),
        stopped_at=between(0.001, 20) if may_hang or chance(0.3) else None,
        latency=rng.choice((0.0, 0.001, 0.05)),
        fails=0.0 if is_calm else rng.choice((0.0, 0.05, 0.3)),
        refuses=0.0 if is_calm else rng.choice((0.0, 0.0, 0.05)),
        unknown=0.0 if is_calm else rng.choice((0.0, 0.0, 0.05)),
        late=0.0 if is_calm else rng.choice((0.0, 0.1)),
        status_after_end=rng.choice((200, 200, 400, 404)),
        repeats_stops=chance(0.2),
        resets=() if is_calm else tuple(rng.uniform(0, 10) for _ in range(rng.choice((0, 0, 1, 3)))),
        outages=() if is_calm or chance(0.7) else ((rng.uniform(0, 5), between(0.001, 10_000)),),
        freezes=() if chance(0.85) else ((rng.uniform(0, 5), between(0.1, 100_000)),),
    )
