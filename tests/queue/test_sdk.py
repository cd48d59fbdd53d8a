"""The SDK's pings: the ids of running jobs, and the connections."""

import pytest

from tests.support.local_server import Hello, LocalServer
from tests.support.proxy import Proxy
from worker.queue.sdk import PINGED_BYTES, PingedJobs, PingSession


@pytest.fixture
def pinged() -> PingedJobs:
    return PingedJobs()


def pings(pinged: PingedJobs, count: int) -> list[list[str]]:
    """Return the ids in so many pings."""
    return [(pinged.get() or "").split(",") for _ in range(count)]


def test_without_jobs_a_ping_has_no_ids(pinged: PingedJobs) -> None:
    assert pinged.get() is None


def test_a_few_jobs_are_in_every_ping(pinged: PingedJobs) -> None:
    pinged.set("b,a,c")
    assert [sorted(ids) for ids in pings(pinged, 3)] == [["a", "b", "c"]] * 3


def test_many_jobs_take_turns(pinged: PingedJobs) -> None:
    ids = [f"{number:03}-{'x' * 40}" for number in range(250)]
    pinged.set(",".join(ids))
    first, second, third = pings(pinged, 3)
    assert max(len("%2C".join(ids)) for ids in (first, second, third)) <= PINGED_BYTES
    assert {*first, *second} == set(ids)
    assert {*second, *third} == set(ids)


def test_the_turns_go_on_when_jobs_end(pinged: PingedJobs) -> None:
    ids = [f"{number:03}-{'x' * 40}" for number in range(250)]
    pinged.set(",".join(ids))
    (first,) = pings(pinged, 1)
    pinged.set(",".join(set(ids) - set(first)))
    assert set(pings(pinged, 1)[0]) == set(ids) - set(first)


def test_each_ping_has_a_connection_of_its_own() -> None:
    with LocalServer(Hello) as server, Proxy(server.server_port) as proxy, PingSession() as session:
        for _ in range(2):
            assert session.get(f"http://127.0.0.1:{proxy.port}/", timeout=10).status_code == 200
        assert proxy.opened == 2
