"""The worker's life."""

from worker.lifecycle import Status


def test_it_loads_then_is_ready_then_drains() -> None:
    status = Status()
    states = [status.state]
    status.ready({"model": "m"}, lambda: False)
    states.append(status.state)
    status.drain()
    assert [*states, status.state] == ["loading", "ready", "draining"]
    assert status.engine == {"model": "m"}
    assert status.uptime >= 0


def test_a_dead_engine_counts_for_more_than_anything_else() -> None:
    status, dead = Status(), [False]
    status.ready({}, lambda: dead[0])
    status.drain()
    dead[0] = True
    assert status.state == "dead"
