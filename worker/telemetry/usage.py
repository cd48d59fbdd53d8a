"""What a job has had of the engine, known at any moment and whatever the client asked to be told."""

from collections import Counter
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from worker.errors import Rejection


class EngineRequest(Protocol):
    """One request to the engine, as far as it has got."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, media included."""

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far."""

    @property
    def media(self) -> Mapping[str, int]:
        """How many images, videos and so on are in the prompt."""

    @property
    def adapter(self) -> str | None:
        """The LoRA adapter that answers, if one does."""

    @property
    def queue_seconds(self) -> float | None:
        """How long it waited in the engine's queue; None until it is scheduled."""

    @property
    def first_token_at(self) -> float | None:
        """When the first token came, in seconds since the epoch."""

    @property
    def finish_reason(self) -> str | None:
        """Why it ended: `stop`, `length`, …; None while it has not, or was aborted."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """One link to an image, a video or so on that was fetched."""

    seconds: float
    size: int
    """In bytes."""


class Meter:
    """Adds up the requests that one job makes to the engine, and the media fetched for them."""

    def __init__(self) -> None:
        self._requests: list[EngineRequest] = []
        self.fetches: list[Fetch] = []
        self.rejections: list[Rejection] = []
        """Why media were not taken."""

    def add(self, request: EngineRequest) -> None:
        """Take in a request; it is asked again at every reading, also after it has ended."""
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
        """How many images, videos and so on all prompts hold."""
        return dict(sum((Counter(request.media) for request in self._requests), Counter[str]()))

    @property
    def adapter(self) -> str | None:
        """The LoRA adapter that answers, if one does."""
        return next((request.adapter for request in self._requests if request.adapter), None)

    @property
    def queue_seconds(self) -> float | None:
        """The longest wait in the engine's queue."""
        return max((wait for request in self._requests if (wait := request.queue_seconds) is not None), default=None)

    @property
    def first_token_at(self) -> float | None:
        """When the first token of all came, in seconds since the epoch."""
        return min((time for request in self._requests if (time := request.first_token_at) is not None), default=None)

    @property
    def finish_reason(self) -> str | None:
        """Why the last request ended."""
        return next((reason for request in reversed(self._requests) if (reason := request.finish_reason)), None)


metered: ContextVar[Meter | None] = ContextVar("metered", default=None)
"""The meter of the job in whose context the engine is called."""
