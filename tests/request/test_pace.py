"""The pace of a stream. The test sets the time."""

import pytest

from worker.request.pace import Pace


def test_the_first_part_is_sent_at_once() -> None:
    assert Pace(0.025).wait(now=1000.0) <= 0


@pytest.mark.parametrize(
    ("streams", "expected"),
    [
        pytest.param(1, [25, 25, 25, 25], id="one"),
        pytest.param(8, [25, 31.25, 31.25, 31.25], id="few"),
        pytest.param(32, [25, 50, 52.7, 52.7], id="some"),
        pytest.param(85, [25, 50, 100, 100], id="many"),
        pytest.param(500, [25, 50, 100, 100], id="very many"),
    ],
)
def test_the_windows_grow_with_the_number_of_streams(streams: int, expected: list[float]) -> None:
    pace, now, windows = Pace(0.025, lambda: streams), 1000.0, []
    for _ in range(4):
        pace.sent(now)
        windows.append(1000 * pace.wait(now))
        now += windows[-1] / 1000
    assert windows == pytest.approx(expected, abs=0.1)


def test_a_part_after_the_end_of_its_window_is_sent_at_once() -> None:
    pace = Pace(0.025)
    pace.sent(now=1000.0)
    assert pace.wait(now=1000.01) == pytest.approx(0.015)
    assert pace.wait(now=1001.0) <= 0
