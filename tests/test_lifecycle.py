"""The states of the worker, and the error that callers get in each."""

import asyncio
from typing import get_args

import pytest

from tests.support.clock import run_on_virtual_clock
from worker.errors import EngineDiedError, JobError, StartFailedError, UnavailableError
from worker.lifecycle import Lifecycle, State


def test_it_starts_then_is_ready_then_drains() -> None:
    lifecycle = Lifecycle()
    states = [lifecycle.state]
    lifecycle.ready(lambda: False)
    states.append(lifecycle.state)
    lifecycle.stopping.set()
    assert [*states, lifecycle.state] == ["starting", "ready", "draining"]


def test_a_dead_engine_overrides_every_other_state() -> None:
    lifecycle, is_dead = Lifecycle(), False
    lifecycle.ready(lambda: is_dead)
    lifecycle.stopping.set()
    is_dead = True
    assert lifecycle.state == "dead"
    lifecycle.fail("the queue is gone")
    assert lifecycle.state == "dead"


def test_a_worker_that_is_not_ready_does_not_drain() -> None:
    starting, refused = Lifecycle(), Lifecycle()
    starting.stopping.set()
    refused.refuse("DTYPE is wrong")
    refused.stopping.set()
    assert (starting.state, refused.state) == ("starting", "refused")


def in_state(state: State) -> Lifecycle:
    """Return a lifecycle that has reached a state."""
    lifecycle = Lifecycle()
    if state in ("ready", "draining", "dead"):
        lifecycle.ready(lambda: state == "dead")
    if state == "draining":
        lifecycle.stopping.set()
    elif state == "failed":
        lifecycle.fail("the disk is full")
    elif state == "refused":
        lifecycle.refuse("DTYPE is wrong")
    return lifecycle


@pytest.mark.parametrize(
    ("state", "kind", "message", "retry_after"),
    [
        ("starting", UnavailableError, "loading its model. Try again", "5"),
        ("ready", UnavailableError, "shutting down. Send the request again", "5"),
        ("draining", UnavailableError, "shutting down. Send the request again", "5"),
        ("dead", UnavailableError, "engine has died", "5"),
        ("failed", UnavailableError, "has failed: the disk is full", "5"),
        ("refused", StartFailedError, "settings are changed: DTYPE is wrong", None),
    ],
)
def test_the_error_in_each_state(state: State, kind: type[JobError], message: str, retry_after: str | None) -> None:
    lifecycle = in_state(state)
    assert lifecycle.state == state
    error = lifecycle.error()
    assert type(error) is kind
    assert message in str(error)
    assert (error.status, error.headers.get("retry-after")) == (503, retry_after)


@pytest.mark.parametrize("state", get_args(State))
def test_running_requests_end_at_once_only_if_the_worker_fails_or_refuses(state: State) -> None:
    assert in_state(state).over.is_set() is (state in ("failed", "refused"))


# ---- serve


class Requests:
    """Requests that run for so many seconds, or until the worker is over."""

    def __init__(self, lifecycle: Lifecycle, seconds: float) -> None:
        self.lifecycle = lifecycle
        self.seconds = seconds
        self.ended_at = 0.0
        self.error: JobError | None = None

    async def run(self) -> None:
        try:
            async with asyncio.timeout(self.seconds):
                await self.lifecycle.over.wait()
            self.error = self.lifecycle.error()
        except TimeoutError:
            pass
        self.ended_at = asyncio.get_running_loop().time()

    async def idle(self, seconds: float) -> None:
        await asyncio.wait({self.running}, timeout=seconds)

    async def serve(self, stop_at: float, die_at: float, grace: float) -> None:
        loop = asyncio.get_running_loop()
        self.running = asyncio.create_task(self.run())
        dead = asyncio.Event()
        self.lifecycle.ready(dead.is_set)
        loop.call_at(stop_at, self.lifecycle.stopping.set)
        loop.call_at(die_at, dead.set)

        async def died() -> None:
            await dead.wait()

        await self.lifecycle.serve(died(), self.idle, grace)


@pytest.mark.parametrize(
    ("seconds", "stop_at", "die_at", "ended_at", "error"),
    [
        pytest.param(3, 1, 99, 3, None, id="finishes within the grace"),
        pytest.param(30, 1, 99, 6, "shutting down", id="outlasts the grace"),
        pytest.param(30, 99, 2, 2, "engine has died", id="the engine dies"),
        pytest.param(30, 1, 3, 3, "engine has died", id="the engine dies within the grace"),
    ],
)
def test_requests_end_when_the_worker_does(
    seconds: float, stop_at: float, die_at: float, ended_at: float, error: str | None
) -> None:
    requests = Requests(Lifecycle(), seconds)
    serving = requests.serve(stop_at, die_at, grace=5)
    if die_at < 50:
        with pytest.raises(EngineDiedError):
            run_on_virtual_clock(serving)
    else:
        run_on_virtual_clock(serving)
    assert requests.ended_at == pytest.approx(ended_at)
    assert (error is None and requests.error is None) or (error or "") in str(requests.error)
    assert requests.lifecycle.stopping.is_set()
