"""No schedule violates an invariant, and every planted bug is found. `make simulate` runs more schedules."""

import logging
from collections.abc import Iterator
from itertools import islice

import pytest

from tests.simulation import schedule
from tests.simulation.plants import PLANTS, planted

SCHEDULES = 5000
PART = 500


@pytest.fixture(autouse=True)
def _silence() -> Iterator[None]:
    """The log of thousands of failing platforms would fill the memory."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def violations(first: int, count: int) -> Iterator[str]:
    """Run schedules, and yield the first violation of each that has any."""
    for seed in range(first, first + count):
        if violation := schedule.first_violation(seed):
            yield violation


@pytest.mark.parametrize("first", range(0, SCHEDULES // 2, PART))
def test_no_schedule_violates_an_invariant(first: int) -> None:
    assert list(islice(violations(first, PART), 5)) == []


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_found(name: str) -> None:
    with planted(name):
        assert next(violations(0, SCHEDULES), None) is not None


def test_the_same_seed_gives_the_same_schedule() -> None:
    with planted("hole"):
        first, second = (list(islice(violations(0, 100), 3)) for _ in range(2))
    assert first == second != []
