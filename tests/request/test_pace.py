"""The pace of a stream, by a clock that the test turns."""

import pytest

from worker.request.pace import Pace


def test_the_first_part_goes_out_at_once() -> None:
    assert Pace(0.025).wait(now=1000.0) <= 0


def test_windows_grow_to_four_times_the_shortest() -> None:
    pace, now, windows = Pace(0.025), 1000.0, []
    for _ in range(5):
        pace.went(now)
        windows.append(pace.wait(now))
        now += windows[-1]
    assert windows == pytest.approx([0.025, 0.05, 0.1, 0.1, 0.1])


def test_a_part_that_came_later_than_its_window_does_not_wait() -> None:
    pace = Pace(0.025)
    pace.went(now=1000.0)
    assert pace.wait(now=1000.01) == pytest.approx(0.015)
    assert pace.wait(now=1001.0) <= 0
