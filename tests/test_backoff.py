"""Waits between attempts."""

from worker.backoff import Backoff


def test_waits_double_up_to_the_longest_and_start_again_after_a_reset() -> None:
    backoff = Backoff(first=0.5, most=3.0, chance=lambda: 1.0)
    assert [backoff.next() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    backoff.reset()
    assert backoff.next() == 0.5


def test_jitter_shortens_a_wait_by_half_at_most() -> None:
    backoff = Backoff(first=1.0, most=10.0, chance=lambda: 0.0)
    assert [backoff.next() for _ in range(3)] == [0.5, 1.0, 2.0]
