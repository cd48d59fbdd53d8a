"""What a job's handler yields."""

from dataclasses import dataclass
from typing import Any

from worker.errors import Json


@dataclass(frozen=True, slots=True)
class Progress:
    """What `/status` shows from now on while the job runs. It is no part of the output."""

    value: Json


@dataclass(frozen=True, slots=True)
class Left:
    """The job ends here without a result. The platform may give it to another worker, which goes on with it."""

    reason: str


Output = str | Json | list[Any] | Progress | Left
"""A part of the job's output, or news about the job."""
