"""How many jobs a worker asks for, given what its engine does."""

import pytest

from worker.queue.places import Places
from worker.telemetry.usage import EngineLoad


def load(running: int = 0, capacity: int = 256, sent: int = 0, waiting: int = 0, kv_cache: float = 0.0) -> EngineLoad:
    """Return the load of an engine that also has requests which it has not reported, or which wait."""
    return EngineLoad(capacity, running + waiting + sent, running, waiting, kv_cache)


def free(load: EngineLoad, jobs: int, starting: int = 0, most: int = 250, room: int = 1000) -> int:
    """Return the free places of a worker that asks for up to 16 jobs at once."""
    return Places(most, batch=16, load=lambda: load, room=lambda: room).free(jobs, starting)


def test_an_idle_worker_asks_for_one_batch() -> None:
    assert free(load(), jobs=0) == 16


def test_a_small_engine_gets_no_more_than_it_runs_at_once() -> None:
    assert free(load(capacity=4), jobs=0) == 4
    assert free(load(capacity=4, running=4), jobs=4) == 0
    assert free(load(capacity=4, running=2), jobs=3, starting=1) == 1


def test_for_every_sixteen_running_requests_one_job_may_wait() -> None:
    assert free(load(capacity=64, running=64), jobs=64) == 4
    assert free(load(capacity=64, running=64, sent=1), jobs=65) == 3
    assert free(load(capacity=64, running=64), jobs=68, starting=4) == 0


@pytest.mark.parametrize("jobs", [0, 1, 40])
def test_nothing_is_asked_for_while_a_request_waits_in_the_engine(jobs: int) -> None:
    assert free(load(running=30, waiting=1), jobs) == 0


def test_few_jobs_may_be_on_their_way_into_the_engine() -> None:
    assert free(load(running=30), jobs=40, starting=10) == 16
    assert free(load(running=30), jobs=56, starting=26) == 6
    assert free(load(running=30, sent=4), jobs=56, starting=22) == 6
    assert free(load(running=30, sent=20), jobs=62, starting=12) == 0


def test_jobs_that_the_engine_has_answered_are_not_on_their_way() -> None:
    assert free(load(running=30), jobs=80) == 16


def test_the_requests_of_one_job_do_not_hide_other_jobs() -> None:
    assert free(load(running=128), jobs=28, starting=27) == 5


@pytest.mark.parametrize(
    ("kv_cache", "expected", "with_two_more"),
    [
        pytest.param(0.1, 16, 16, id="nearly empty"),
        pytest.param(0.5, 10, 8, id="as many again fit"),
        pytest.param(0.8, 2, 0, id="a quarter of them fits"),
        pytest.param(0.89, 1, 0, id="one is always tried"),
        pytest.param(0.95, 0, 0, id="full"),
    ],
)
def test_requests_like_those_that_run_have_to_fit_into_the_kv_cache(
    kv_cache: float, expected: int, with_two_more: int
) -> None:
    assert free(load(running=10, kv_cache=kv_cache), jobs=10) == expected
    assert free(load(running=10, sent=2, kv_cache=kv_cache), jobs=12) == with_two_more


def test_the_settings_and_the_memory_are_upper_bounds() -> None:
    assert free(load(running=30), jobs=30, most=32) == 2
    assert free(load(running=30), jobs=40, most=32) == 0
    assert free(load(running=30), jobs=30, room=3) == 3
