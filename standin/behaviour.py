"""Variants of the platform's behaviour, for what is known only from reports, and faults to inject."""

from dataclasses import dataclass, field
from typing import Literal

RouteKind = Literal["take", "stop", "stream", "done", "ping"]
POSTS: frozenset[RouteKind] = frozenset({"stream", "done"})
"""The routes on which a worker posts parts and results."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault to inject into one request of the worker. `Fault()` is no fault.

    `status` (with `body`) or a `reset` of the connection replaces the platform's answer. The request then has no
    effect, unless `handled` is set. `delay` and `answer_delay` are in seconds.
    """

    delay: float = 0.0
    answer_delay: float = 0.0
    """The answer's status and headers are sent at once, and its body this much later."""
    status: int | None = None
    body: bytes = b""
    reset: bool = False
    handled: bool = False
    """The request has its effect, and only the answer is lost: a result is stored, or a job counts as delivered."""
    cut: bool = False
    """Half of the platform's own answer is sent, then the connection is reset."""
    duplicate: bool = False
    """The jobs of this take are delivered a second time."""

    @property
    def replaces_reply(self) -> bool:
        return self.reset or self.status is not None


NO_FAULT = Fault()


@dataclass(slots=True)
class Behaviour:
    """Settings of a `Platform`. Times are in seconds, sizes in bytes."""

    no_job_status: Literal[200, 204, 400] = 204
    """Answer to a job-take when no job is available. 400 was seen with FlashBoot; 200 has an empty body."""
    take_hold: float = 20.0
    stop_hold: float = 20.0
    stream_hold: float = 1.0
    """The holds are how long a job-take, a job-stop and `/stream` wait before they answer without content."""
    sync_wait: float = 90.0
    """How long `/runsync` waits for the result, unless the request has `wait`."""
    get_input: Literal["absent", "null", "empty"] = "absent"
    """`openai_input` of a request without a body through the `/openai` proxy. All three were seen for GET."""
    drop_empty_input: bool = True
    proxy_failed_status: int = 500
    proxy_cancels: bool = True
    """Whether a client that disconnects from the `/openai` proxy cancels its job."""
    execution_timeout: float = 600.0
    post_delay: float = 0.0
    """How long each post of a part or of a result takes."""
    answer_delay: float = 0.0
    """How long after its status and headers the body of each answer to such a post is sent."""
    repeat_stops: bool = False
    """Whether job-stop names a job again and again, at once, after it has named it."""
    is_away: bool = False
    """Whether every request of the worker is answered with a connection reset, as if the platform were down."""
    api_key: str | None = None
    """If set, clients must send it as `Authorization: Bearer KEY`."""
    run_limit: int = 10_000_000
    runsync_limit: int = 20_000_000
    stream_post_limit: int = 1_000_000
    done_post_limit: int | None = None
    done_refusal_status: int = 400
    """Answer to a result over `done_post_limit`. RunPod sends 400; 413 was seen as well."""
    faults: dict[RouteKind, list[Fault]] = field(default_factory=dict)
    """Faults for the next requests of each kind, in order. Long polls that are already waiting are not affected."""

    def next_fault(self, kind: RouteKind) -> Fault:
        if script := self.faults.get(kind):
            return script.pop(0)
        return Fault(delay=self.post_delay, answer_delay=self.answer_delay) if kind in POSTS else NO_FAULT
