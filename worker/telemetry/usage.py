"""Engine usage of one job: tokens, media and times, whether or not the client asked for usage statistics."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from worker.errors import MediaError, Rejection

RejectedMedia = TypeVar("RejectedMedia", bound=MediaError)


@dataclass(frozen=True, slots=True)
class EngineUsage:
    """What a request has used of the engine so far, or all requests of a job together."""

    prompt_tokens: int = 0
    """Tokens of the prompt, media included."""
    completion_tokens: int = 0
    """Tokens generated so far."""
    media: Mapping[str, int] = field(default_factory=dict)
    """The number of images, videos and so on in the prompt."""
    adapter: str | None = None
    """The LoRA adapter, if one is used."""
    queue_seconds: float | None = None
    """Seconds in the engine's queue; None until the request is scheduled."""
    first_token_at: float | None = None
    """The time of the first token, in seconds since the epoch."""
    finish_reason: str | None = None
    """Why the request ended: `stop`, `length`, …; None while it runs, or if it was aborted."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What the engine has to do."""

    capacity: int = 1_000_000
    """The most requests that it runs at once."""
    requests: int = 0
    """Requests that were sent to it and have not ended."""
    running: int = 0
    """Those that run, according to its last report."""
    waiting: int = 0
    """Those that wait to be scheduled, according to its last report."""
    kv_cache: float = 0.0
    """The share of the KV cache in use, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """One download of media."""

    seconds: float
    size: int
    """In bytes."""


class Usage:
    """One job's requests to the engine, and its downloads of media."""

    def __init__(self) -> None:
        self._requests: list[Callable[[], EngineUsage]] = []
        self.fetches: list[Fetch] = []
        self.rejections: list[Rejection] = []
        """The reasons for which media were rejected."""

    @property
    def has_reached_engine(self) -> bool:
        """Whether the job has had any request in the engine."""
        return bool(self._requests)

    @property
    def requests(self) -> int:
        """How many requests the job has had in the engine."""
        return len(self._requests)

    def add(self, request: Callable[[], EngineUsage]) -> None:
        """Add a request. Its usage is read whenever the total is, also after its end."""
        self._requests.append(request)

    def total(self) -> EngineUsage:
        """Return the usage of all requests: sums, the longest wait, the first token, the last reason for an end."""
        requests = [read() for read in self._requests]

        def values(name: str) -> Iterator[Any]:
            return (value for request in requests if (value := getattr(request, name)) is not None)

        return EngineUsage(
            prompt_tokens=sum(values("prompt_tokens")),
            completion_tokens=sum(values("completion_tokens")),
            media=sum(map(Counter, values("media")), Counter[str]()),
            adapter=next(values("adapter"), None),
            queue_seconds=max(values("queue_seconds"), default=None),
            first_token_at=min(values("first_token_at"), default=None),
            finish_reason=next(reversed([*values("finish_reason")]), None),
        )


def rejected(error: RejectedMedia) -> RejectedMedia:
    """Count an error about media in the usage of the current job, if there is one, and return it."""
    if (usage := current_usage.get()) is not None:
        usage.rejections.append(error.reason)
    return error


current_usage: ContextVar[Usage | None] = ContextVar("current_usage", default=None)
"""The usage of the job that the current task works for."""
