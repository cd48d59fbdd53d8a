"""What the worker was seen to do."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Ping:
    """One heartbeat, with the ids of the jobs that the worker says it is running."""

    worker: str
    job_ids: tuple[str, ...]
    version: str
    at: float


@dataclass(frozen=True, slots=True)
class Take:
    """One request for jobs. The single route asks for a batch of one."""

    worker: str
    batch_size: int
    job_in_progress: bool
    at: float


@dataclass(slots=True)
class Records:
    """Counts and lists grow for as long as the platform lives."""

    pings: list[Ping] = field(default_factory=list)
    takes: list[Take] = field(default_factory=list)
    stream_posts: int = 0
    done_posts: int = 0
    duplicate_dones: list[str] = field(default_factory=list)
    """Ids of results that came for a job which is unknown or had already ended."""
    late_streams: list[str] = field(default_factory=list)
    """Ids of chunks that came for a job which is unknown or had already ended."""
    oversized_posts: list[str] = field(default_factory=list)
    """Ids of the jobs whose chunk was refused for its size."""
    stop_signals: list[str] = field(default_factory=list)
    """Ids of the jobs that a worker was told to stop."""
    refreshes: int = 0
    """Results that asked for the worker to be replaced (`stopPod`)."""
