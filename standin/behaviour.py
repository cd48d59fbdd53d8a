"""What the stand-in does where the real platform is only known from reports, and the faults it is told to make."""

from dataclasses import dataclass, field
from typing import Literal

RouteKind = Literal["take", "stop", "stream", "done", "ping"]


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with one request of the worker. `Fault()` is a request that goes well.

    A `status` or a `reset` takes the place of the platform's own answer. With `handled`, the request has had its effect
    by then: the worker is left not knowing that its result arrived, or never sees the job that it was given.
    """

    delay: float = 0.0
    status: int | None = None
    body: bytes = b""
    reset: bool = False
    handled: bool = False
    cut: bool = False
    """The platform's own answer, of which half arrives before the connection is reset."""
    duplicate: bool = False
    """Of a take: the jobs that it hands out are handed out once more."""

    @property
    def replaces_reply(self) -> bool:
        return self.reset or self.status is not None


NO_FAULT = Fault()


@dataclass(slots=True)
class Behaviour:
    """Times are in seconds."""

    no_job_status: Literal[200, 204, 400] = 204
    """Answer to a job-take that found nothing; 400 has been seen with FlashBoot, 200 comes with an empty body."""
    take_hold: float = 20.0
    stop_hold: float = 20.0
    stream_hold: float = 1.0
    """How long `/stream` waits for a first chunk before it answers without one."""
    sync_wait: float = 90.0
    get_input: Literal["absent", "null", "empty"] = "absent"
    """`openai_input` of a request without a body through the `/openai` proxy: for GET all three have been seen."""
    drop_empty_input: bool = True
    proxy_failed_status: int = 500
    proxy_cancels: bool = True
    """Whether a client that leaves the `/openai` proxy cancels its job."""
    execution_timeout: float = 600.0
    is_away: bool = False
    """Whether every connection of the worker is reset, as by a platform that is not there."""
    api_key: str | None = None
    """Demanded of clients as `Bearer KEY`; without it every key, and none, is accepted."""
    run_limit: int = 10_000_000
    runsync_limit: int = 20_000_000
    stream_post_limit: int = 1_000_000
    faults: dict[RouteKind, list[Fault]] = field(default_factory=dict)
    """Used up in order, one for each request that arrives; a long poll that is already waiting is not affected."""

    def next_fault(self, kind: RouteKind) -> Fault:
        script = self.faults.get(kind)
        return script.pop(0) if script else NO_FAULT
