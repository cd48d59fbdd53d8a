"""Records of the workers' requests, for tests and benchmarks to check."""

from collections import defaultdict
from dataclasses import dataclass, field

from .behaviour import RouteKind


@dataclass(frozen=True, slots=True)
class Ping:
    """One heartbeat, with the ids of the jobs that the worker reports as running."""

    worker: str
    job_ids: tuple[str, ...]
    version: str
    at: float
    url_bytes: int
    """The length of its URL, without scheme and host."""


@dataclass(frozen=True, slots=True)
class Take:
    """One request for jobs. `batch_size` is 1 on the route for a single job."""

    worker: str
    batch_size: int
    job_in_progress: bool
    at: float


@dataclass(slots=True)
class Records:
    """The lists hold job ids unless their type says otherwise, and grow without limit."""

    requests: defaultdict[RouteKind, list[float]] = field(default_factory=lambda: defaultdict(list))
    """When each request of the workers arrived, in seconds of `Platform.now`, also those that met a fault."""
    pings: list[Ping] = field(default_factory=list)
    takes: list[Take] = field(default_factory=list)
    stream_posts: int = 0
    done_posts: int = 0
    progress_posts: int = 0
    post_connections: set[tuple[str, int]] = field(default_factory=set)
    """The TCP connections on which chunks and results were posted, as addresses and ports of the workers."""
    duplicate_dones: list[str] = field(default_factory=list)
    """Results for a job that is unknown or had already ended."""
    late_streams: list[str] = field(default_factory=list)
    """Chunks for a job that is unknown or had already ended."""
    oversized_posts: list[str] = field(default_factory=list)
    """Chunks and results that were refused because of their size."""
    stop_signals: list[str] = field(default_factory=list)
    """Jobs that job-stop returned to a worker."""
    refreshes: int = 0
    """Number of results with `stopPod`, which asks the platform to replace the worker."""
