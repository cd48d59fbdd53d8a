"""Counts, rates and the time left."""

import pytest

from worker.batch.progress import Counts, progress
from worker.batch.results import Summary


def test_counts_add_up() -> None:
    counts = Counts()
    counts.add(Summary(1, "a", True, 7, 5))
    before = counts.copy()
    counts.add(Summary(2, "b", False, 0, 0))
    assert counts == Counts(completed=1, failed=1, tokens_in=7, tokens_out=5)
    assert (before.done, counts.done) == (1, 2)


def test_rates_are_those_of_this_worker() -> None:
    now = progress(Counts(completed=50, tokens_out=1000), Counts(completed=58, failed=2, tokens_out=1400), 100, 20.0)
    assert now.tokens_per_second == 20.0
    assert now.seconds_left == 80.0
    assert now.percent == 60.0


@pytest.mark.parametrize(
    ("done", "total", "left"),
    [
        pytest.param(10, None, None, id="the input is not counted yet"),
        pytest.param(0, 100, None, id="no line has ended"),
        pytest.param(100, 100, 0.0, id="all lines have ended"),
    ],
)
def test_the_time_left_may_be_unknown(done: int, total: int | None, left: float | None) -> None:
    now = progress(Counts(), Counts(completed=done), total, 10.0)
    assert now.seconds_left == left
    assert now.percent == (None if total is None else done)


def test_nothing_is_divided_by_zero() -> None:
    now = progress(Counts(), Counts(), 0, 0.0)
    assert (now.tokens_per_second, now.seconds_left, now.percent) == (0.0, None, 0.0)
