"""How many lines of a batch may be in flight, and the load that is left for callers."""

import asyncio
from contextlib import ExitStack

import pytest
from prometheus_client import CollectorRegistry

from worker.batch import share
from worker.batch.share import Share, without_lines
from worker.memory import Budget
from worker.telemetry.jobs import Telemetry
from worker.telemetry.usage import EngineLoad

CAPACITY = 64


def shared(load: EngineLoad, *, most: int | None = None) -> Share:
    telemetry = Telemetry("model", CollectorRegistry())
    return Share(telemetry, Budget(1000), lambda: load, most)


@pytest.mark.parametrize(
    ("requests", "lines"),
    [
        pytest.param(0, 128, id="an idle engine"),
        pytest.param(67, 128, id="few lines wait in the engine"),
        pytest.param(68, 1, id="enough lines wait in the engine"),
    ],
)
def test_alone_a_batch_keeps_the_engine_full(requests: int, lines: int) -> None:
    assert shared(EngineLoad(CAPACITY, requests)).lines() == lines


def test_the_caller_and_the_settings_limit_the_lines() -> None:
    load = EngineLoad(CAPACITY)
    assert [shared(load).lines(4), shared(load, most=8).lines(), shared(load, most=8).lines(50)] == [4, 8, 8]


@pytest.mark.parametrize(
    ("capacity", "callers", "lines"),
    [
        pytest.param(CAPACITY, 1, 1, id="at least one line"),
        pytest.param(CAPACITY, 40, 8, id="a fifth of the callers"),
        pytest.param(512, 1, 4, id="a fast engine"),
    ],
)
def test_lines_yield_to_callers(capacity: int, callers: int, lines: int) -> None:
    measured = shared(EngineLoad(capacity))
    with ExitStack() as running:
        for _ in range(callers):
            running.enter_context(measured.telemetry.job("job", "/tokenize", {}))
        running.enter_context(measured.telemetry.job("line", "/tokenize", {}, is_line=True))
        assert measured.lines() == lines
    assert measured.telemetry.quiet_seconds < share.QUIET_SECONDS
    # The next caller may be on its way.
    assert measured.lines() == max(1, capacity // 128)


def test_lines_alone_do_not_count_as_callers() -> None:
    measured = shared(EngineLoad(CAPACITY))
    with measured.telemetry.job("line", "/tokenize", {}, is_line=True):
        assert measured.lines() == 2 * CAPACITY
        assert (measured.telemetry.running, measured.telemetry.lines) == (1, 1)


def test_a_batch_leaves_memory_to_callers() -> None:
    async def run() -> list[int]:
        measured = shared(EngineLoad(CAPACITY))
        account = measured.memory.account()
        await account.take(500)
        before = measured.lines()
        await account.take(1)
        return [before, measured.lines()]

    assert asyncio.run(run()) == [2 * CAPACITY, 1]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        pytest.param(0, EngineLoad(64, 100, 60, 40, 0.8), id="no batch"),
        pytest.param(40, EngineLoad(64, 60, 60, 0, 0.48), id="the lines that wait"),
        pytest.param(90, EngineLoad(64, 10, 10, 0, 0.08), id="some that run, too"),
        pytest.param(200, EngineLoad(64, 0, 0, 0, 0.0), id="more than are in the engine"),
    ],
)
def test_the_load_of_callers_is_that_without_lines(lines: int, expected: EngineLoad) -> None:
    load = without_lines(EngineLoad(64, 100, 60, 40, 0.8), lines)
    assert (load.requests, load.running, load.waiting) == (expected.requests, expected.running, expected.waiting)
    assert load.kv_cache == pytest.approx(expected.kv_cache)
    assert without_lines(EngineLoad(64), lines) == EngineLoad(64)
