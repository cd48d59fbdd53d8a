"""The pace of a stream. The test sets the time."""

import pytest

from worker.request.pace import Pace


def test_the_first_part_is_sent_at_once() -> None:
    assert Pace(0.025).wait(now=1000.0) <= 0


def test_windows_grow_to_four_times_the_shortest() -> None:
    pace, now, windows = Pace(0.025), 1000.0, []
    for _ in range(5):
        pace.sent(now)
        windows.append(pace.wait(now))
        now += windows[-1]
    assert windows == pytest.approx([0.025, 0.05, 0.1, 0.1, 0.1])


def test_a_part_after_the_end_of_its_window_is_sent_at_once() -> None:
    pace = Pace(0.025)
    pace.sent(now=1000.0)
    assert pace.wait(now=1000.01) == pytest.approx(0.015)
    assert pace.wait(now=1001.0) <= 0
