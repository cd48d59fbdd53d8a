"""Engine usage of one job: tokens, media and times, whether or not the client asked for usage statistics."""

from collections import Counter
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from worker.errors import Rejection


class EngineRequest(Protocol):
    """The progress of one request to the engine."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, media included."""

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far."""

    @property
    def media(self) -> Mapping[str, int]:
        """The number of images, videos and so on in the prompt."""

    @property
    def adapter(self) -> str | None:
        """The LoRA adapter, if one is used."""

    @property
    def queue_seconds(self) -> float | None:
        """Seconds in the engine's queue; None until the request is scheduled."""

    @property
    def first_token_at(self) -> float | None:
        """The time of the first token, in seconds since the epoch."""

    @property
    def finish_reason(self) -> str | None:
        """Why the request ended: `stop`, `length`, …; None while it runs, or if it was aborted."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """One download of media."""

    seconds: float
    size: int
    """In bytes."""


class Usage:
    """The sum of one job's requests to the engine, and its downloads of media."""

    def __init__(self) -> None:
        self._requests: list[EngineRequest] = []
        self.fetches: list[Fetch] = []
        self.rejections: list[Rejection] = []
        """The reasons for which media were rejected."""

    def add(self, request: EngineRequest) -> None:
        """Add a request. Its progress is read at every access, also after its end."""
        self._requests.append(request)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(request.prompt_tokens for request in self._requests)

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, all answers together."""
        return sum(request.completion_tokens for request in self._requests)

    @property
    def media(self) -> dict[str, int]:
        """The number of images, videos and so on in all prompts."""
        return dict(sum((Counter(request.media) for request in self._requests), Counter[str]()))

    @property
    def adapter(self) -> str | None:
        """The LoRA adapter, if one is used."""
        return next((request.adapter for request in self._requests if request.adapter), None)

    @property
    def queue_seconds(self) -> float | None:
        """The longest time in the engine's queue, in seconds."""
        return max((wait for request in self._requests if (wait := request.queue_seconds) is not None), default=None)

    @property
    def first_token_at(self) -> float | None:
        """The time of the first token of all requests, in seconds since the epoch."""
        return min((time for request in self._requests if (time := request.first_token_at) is not None), default=None)

    @property
    def finish_reason(self) -> str | None:
        """Why the last request ended."""
        return next((reason for request in reversed(self._requests) if (reason := request.finish_reason)), None)


current_usage: ContextVar[Usage | None] = ContextVar("current_usage", default=None)
"""The usage of the job that the current task works for."""
