"""The states of the worker, and the error that callers get in each."""

from typing import get_args

import pytest

from worker.errors import JobError, StartFailedError, UnavailableError
from worker.lifecycle import Lifecycle, State


def test_it_starts_then_is_ready_then_drains() -> None:
    lifecycle = Lifecycle()
    states = [lifecycle.state]
    lifecycle.ready(lambda: False)
    states.append(lifecycle.state)
    lifecycle.drain()
    assert [*states, lifecycle.state] == ["starting", "ready", "draining"]
    assert lifecycle.uptime >= 0


def test_a_dead_engine_overrides_every_other_state() -> None:
    lifecycle, is_dead = Lifecycle(), False
    lifecycle.ready(lambda: is_dead)
    lifecycle.drain()
    is_dead = True
    assert lifecycle.state == "dead"
    lifecycle.fail("the queue is gone")
    assert lifecycle.state == "dead"


def test_a_worker_that_is_not_ready_does_not_drain() -> None:
    starting, refused = Lifecycle(), Lifecycle()
    starting.drain()
    refused.refuse("DTYPE is wrong")
    refused.drain()
    assert (starting.state, refused.state) == ("starting", "refused")


def in_state(state: State) -> Lifecycle:
    """Return a lifecycle that has reached a state."""
    lifecycle = Lifecycle()
    if state in ("ready", "draining", "dead"):
        lifecycle.ready(lambda: state == "dead")
    if state == "draining":
        lifecycle.drain()
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
    assert (error.http_status, error.headers.get("retry-after")) == (503, retry_after)


@pytest.mark.parametrize("state", get_args(State))
def test_running_requests_end_at_once_only_if_the_worker_fails_or_refuses(state: State) -> None:
    assert in_state(state).over.is_set() is (state in ("failed", "refused"))
