"""How many tokens a job has used, known at any moment and whatever the client asked to be told."""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request to the engine, or of all of a job's."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.prompt_tokens + other.prompt_tokens, self.completion_tokens + other.completion_tokens)


class Meter:
    """Adds up the requests that one job makes to the engine; each is counted by the engine's own state of it."""

    def __init__(self) -> None:
        self._requests: list[Callable[[], Usage]] = []

    def add(self, count: Callable[[], Usage]) -> None:
        """Take in a request; `count` tells its tokens so far, also after it has ended."""
        self._requests.append(count)

    def read(self) -> Usage:
        """Return the tokens so far."""
        return sum((count() for count in self._requests), Usage())


metered: ContextVar[Meter | None] = ContextVar("metered", default=None)
"""The meter of the job in whose context the engine is called."""
