"""How many jobs a worker asks for, given what its engine does."""

import pytest

from worker.queue.places import Places
from worker.telemetry.usage import EngineLoad


def free(load: EngineLoad, jobs: int, generating: int | None = None, most: int = 250, room: int = 1000) -> int:
    """Return the free places of a worker that asks for up to 16 jobs at once."""
    places = Places(most, batch=16, load=lambda: load, room=lambda: room)
    return places.free(jobs, jobs if generating is None else generating)


def test_an_idle_worker_asks_for_one_batch() -> None:
    assert free(EngineLoad(capacity=256), jobs=0) == 16


def test_a_small_engine_gets_no_more_than_it_runs_at_once() -> None:
    assert free(EngineLoad(capacity=4), jobs=0) == 4
    assert free(EngineLoad(capacity=4, requests=4), jobs=4) == 0


def test_for_every_sixteen_running_requests_one_job_may_wait() -> None:
    assert free(EngineLoad(capacity=64, requests=64), jobs=64) == 4
    assert free(EngineLoad(capacity=64, requests=64), jobs=68) == 0


@pytest.mark.parametrize("jobs", [0, 1, 40])
def test_nothing_is_asked_for_while_a_request_waits_in_the_engine(jobs: int) -> None:
    assert free(EngineLoad(capacity=256, requests=30, waiting=1), jobs) == 0


def test_few_jobs_may_be_on_their_way_into_the_engine() -> None:
    assert free(EngineLoad(capacity=256, requests=30), jobs=40) == 6
    assert free(EngineLoad(capacity=256, requests=30), jobs=46) == 0
    assert free(EngineLoad(capacity=32, requests=20), jobs=30) == 4


def test_jobs_whose_result_is_being_posted_are_not_on_their_way() -> None:
    assert free(EngineLoad(capacity=256, requests=30), jobs=80, generating=30) == 16


def test_one_job_may_have_several_requests() -> None:
    assert free(EngineLoad(capacity=256, requests=128), jobs=2) == 16


@pytest.mark.parametrize(
    ("kv_cache", "expected"),
    [
        pytest.param(0.1, 16, id="nearly empty"),
        pytest.param(0.5, 10, id="as many again fit"),
        pytest.param(0.8, 2, id="a quarter of them fits"),
        pytest.param(0.89, 1, id="one is always tried"),
        pytest.param(0.95, 0, id="full"),
    ],
)
def test_requests_like_those_that_run_have_to_fit_into_the_kv_cache(kv_cache: float, expected: int) -> None:
    assert free(EngineLoad(capacity=256, requests=10, kv_cache=kv_cache), jobs=10) == expected


def test_the_settings_and_the_memory_are_upper_bounds() -> None:
    assert free(EngineLoad(capacity=256, requests=30), jobs=30, most=32) == 2
    assert free(EngineLoad(capacity=256, requests=30), jobs=40, most=32) == 0
    assert free(EngineLoad(capacity=256, requests=30), jobs=30, room=3) == 3
