"""The worker's job loop, without an engine, against the platform's stand-in and its faults."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from standin import (
    Behaviour,
    Fault,
    Job,
    Platform,
    Records,
    StandinServer,
    Status,
    WorkerProcess,
    worker_environment,
)
from standin.echo_worker import CONCURRENCY
from tests.support.tiny import ROOT
from worker.errors import ENGINE_DIED, LEAVING

SLOTS = 4
COMMAND = [sys.executable, "-P", str(ROOT / "standin/echo_worker.py"), "event"]


@contextmanager
def running_worker(behaviour: Behaviour, **environ: str) -> Iterator[tuple[StandinServer, WorkerProcess]]:
    with StandinServer(Platform(behaviour)) as server:
        environment = {**worker_environment(server.port), "PYTHONPATH": str(ROOT), **environ}
        with WorkerProcess(COMMAND, environment) as worker:
            server.wait_until(lambda platform: platform.records.takes)
            yield server, worker


@pytest.fixture(scope="module")
def shared() -> Iterator[StandinServer]:
    with running_worker(Behaviour(take_hold=5)) as (server, _):
        yield server


@pytest.fixture
def server(shared: StandinServer) -> StandinServer:
    """Give the shared stand-in a behaviour and records of its own for each test."""
    shared.platform.behaviour = Behaviour(take_hold=5)
    shared.platform.records = Records()
    return shared


def submit(server: StandinServer, job_input: Any) -> Job:
    return server.call(server.platform.submit, {"input": job_input})


def finished(server: StandinServer, *jobs: Job) -> list[Status]:
    server.wait_until(lambda _: all(job.status not in (Status.IN_QUEUE, Status.IN_PROGRESS) for job in jobs))
    return [job.status for job in jobs]


def test_a_job_is_answered_in_order_and_once(server: StandinServer) -> None:
    job = submit(server, {"count": 5})
    assert finished(server, job) == [Status.COMPLETED]
    assert job.output == [f"part {number}" for number in range(5)]
    assert (server.platform.records.stream_posts, server.platform.records.done_posts) == (5, 1)


@pytest.mark.parametrize(
    ("job_input", "error"),
    [
        pytest.param({"error": "no"}, "no", id="error"),
        pytest.param({"error": '{"code": 400}'}, '{"code": 400}', id="JSON"),
    ],
)
def test_a_failed_job_carries_its_error_as_it_is(server: StandinServer, job_input: Any, error: str) -> None:
    job = submit(server, job_input)
    assert finished(server, job) == [Status.FAILED]
    assert job.error == error


def test_every_slot_is_used_and_no_more(server: StandinServer) -> None:
    hanging = [submit(server, {"hang": True}) for _ in range(SLOTS)]
    server.wait_until(lambda _: all(job.status is Status.IN_PROGRESS for job in hanging))
    late = submit(server, {"count": 1})
    time.sleep(0.3)
    assert late.status is Status.IN_QUEUE
    server.call(server.platform.cancel, hanging[0])
    assert finished(server, late) == [Status.COMPLETED]
    for job in hanging[1:]:
        server.call(server.platform.cancel, job)


def test_jobs_are_taken_while_others_run(server: StandinServer) -> None:
    hanging = submit(server, {"hang": True})
    server.wait_until(lambda _: hanging.status is Status.IN_PROGRESS)
    assert finished(server, submit(server, {"count": 1})) == [Status.COMPLETED]
    assert hanging.status is Status.IN_PROGRESS
    server.wait_until(lambda platform: any(hanging.id in ping.job_ids for ping in platform.records.pings))
    server.call(server.platform.cancel, hanging)


def stopped_jobs(server: StandinServer) -> list[str]:
    job = submit(server, {"stopped": True})
    assert finished(server, job) == [Status.COMPLETED]
    ids: list[str] = job.output[0]
    return ids


def test_a_stop_signal_reaches_the_handler(server: StandinServer) -> None:
    job = submit(server, {"hang": True})
    server.wait_until(lambda _: job.chunks)
    server.call(server.platform.cancel, job)
    server.wait_until(lambda platform: job.id in platform.records.stop_signals)
    assert job.id in stopped_jobs(server)
    assert server.platform.records.done_posts == 1


def test_the_slot_of_a_stopped_job_is_free_for_the_next(server: StandinServer) -> None:
    hanging = [submit(server, {"hang": True}) for _ in range(CONCURRENCY)]
    waiting = submit(server, {"count": 1})
    server.wait_until(lambda _: all(job.chunks for job in hanging))
    assert waiting.status is Status.IN_QUEUE
    server.call(server.platform.cancel, hanging[0])
    assert finished(server, waiting) == [Status.COMPLETED]
    for job in hanging[1:]:
        server.call(server.platform.cancel, job)


def test_a_stop_signal_reaches_the_handler_while_a_batch_is_posted(server: StandinServer) -> None:
    server.platform.behaviour.faults["stream"] = [Fault(delay=30)]
    job = submit(server, {"hang": True})
    server.wait_until(lambda platform: not platform.behaviour.faults["stream"])
    server.call(server.platform.cancel, job)
    server.wait_until(lambda platform: job.id in platform.records.stop_signals)
    assert job.id in stopped_jobs(server)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(status=500), id="500"),
        pytest.param(Fault(status=429), id="429"),
        pytest.param(Fault(status=200, body=b"<html>garbage"), id="garbage"),
        pytest.param(Fault(status=200, body=b'"text"'), id="no job"),
        pytest.param(Fault(status=200, body=b'[{"input": {}}, 7]'), id="jobs without an id"),
        pytest.param(Fault(status=204), id="empty at once"),
        pytest.param(Fault(status=400), id="400 at once"),
        pytest.param(Fault(reset=True), id="reset"),
    ],
)
def test_a_failing_platform_is_asked_again_but_not_in_a_spin(server: StandinServer, fault: Fault) -> None:
    server.platform.behaviour.faults["take"] = [fault] * 4
    first = submit(server, {"count": 1})  # Ends the long poll that waits since before the faults.
    started = time.monotonic()
    job = submit(server, {"count": 1})
    assert finished(server, first, job) == [Status.COMPLETED] * 2
    server.wait_until(lambda platform: len(platform.behaviour.faults["take"]) == 0)
    # Four answers in a spin take milliseconds; aiohttp itself asks again once after a reset.
    assert time.monotonic() - started > 0.1


def test_an_empty_input_that_the_platform_dropped_is_answered(server: StandinServer) -> None:
    job = submit(server, {})
    assert finished(server, job) == [Status.COMPLETED]
    assert job.output == [{"input": None}]


def test_a_job_given_twice_is_answered_once(server: StandinServer) -> None:
    server.platform.behaviour.faults["take"] = [Fault(), Fault(duplicate=True)]
    jobs = [submit(server, {"sleep": 0.3}) for _ in range(3)]
    assert finished(server, *jobs) == [Status.COMPLETED] * 3
    assert server.platform.records.duplicate_dones == []


@pytest.mark.parametrize("kind", ["stream", "done"])
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(status=500), id="500"),
        pytest.param(Fault(status=429), id="429"),
        pytest.param(Fault(reset=True), id="reset"),
    ],
)
def test_a_result_that_was_not_taken_is_posted_again(server: StandinServer, kind: Any, fault: Fault) -> None:
    server.platform.behaviour.faults[kind] = [fault, fault]
    job = submit(server, {"count": 3})
    assert finished(server, job) == [Status.COMPLETED]
    assert job.output == ["part 0", "part 1", "part 2"]
    assert [chunk["output"] if isinstance(chunk, dict) else chunk for chunk in job.chunks] == job.output


def test_a_result_that_was_refused_does_not_hold_up_the_next(server: StandinServer) -> None:
    server.platform.behaviour.faults["stream"] = [Fault(status=404)]
    job = submit(server, {"count": 2})
    assert finished(server, job) == [Status.COMPLETED]
    assert len(job.chunks) == 1


@pytest.mark.parametrize("kind", ["stream", "done"])
def test_a_platform_that_is_away_for_a_while_gets_everything_in_order(server: StandinServer, kind: str) -> None:
    job = submit(server, {"count": 3} if kind == "stream" else {"sleep": 0.5})
    server.wait_until(lambda _: job.status is Status.IN_PROGRESS)
    server.platform.behaviour.is_away = True
    server.drop_connections()
    time.sleep(2)
    server.platform.behaviour.is_away = False
    late = submit(server, {"count": 1})
    assert finished(server, job, late) == [Status.COMPLETED] * 2
    assert job.output == (["part 0", "part 1", "part 2"] if kind == "stream" else ["slept"])
    assert job.chunks == job.output
    assert server.platform.records.duplicate_dones == []


@pytest.mark.parametrize("kind", ["take", "stream", "done", "stop"])
def test_an_answer_that_is_cut_off_is_survived(server: StandinServer, kind: Any) -> None:
    """What a take that was cut off gave is lost to the platform's own time limit; nothing else is."""
    server.platform.behaviour.faults[kind] = [Fault(cut=True)]
    first = submit(server, {"count": 2})  # Ends the long poll that waits since before the fault.
    server.wait_until(lambda platform: not platform.behaviour.faults[kind] or kind == "stop")
    second = submit(server, {"count": 2})
    server.wait_until(lambda _: second.status is not Status.IN_QUEUE)
    last = submit(server, {"count": 2})
    answered = [first, last] if kind == "take" else [first, second, last]
    assert set(finished(server, *answered)) == {Status.COMPLETED}


def test_a_result_that_is_too_large_fails_in_words(server: StandinServer) -> None:
    job = submit(server, {"size": 21_000_000})
    assert finished(server, job) == [Status.FAILED]
    assert "Use streaming, or ask for fewer tokens" in job.error
    server.platform.behaviour.faults["done"] = [Fault(status=413)]
    job = submit(server, {"size": 2_000_000})
    assert finished(server, job) == [Status.FAILED]
    assert server.platform.records.oversized_posts == []


def test_a_large_result_needs_no_yield(server: StandinServer) -> None:
    job = submit(server, {"size": 2_000_000})
    assert finished(server, job) == [Status.COMPLETED]
    assert (len(job.output[0]), job.chunks) == (2_000_000, [])


@pytest.mark.parametrize("silent", [True, False])
def test_what_outlasts_the_grace_of_a_stopped_worker_fails_in_words(silent: bool) -> None:
    with running_worker(Behaviour(), DRAIN_SECONDS="0.5") as (server, worker):
        job = submit(server, {"hang": True, "silent": silent})
        server.wait_until(lambda _: job.status is Status.IN_PROGRESS)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=20) == 0
        assert (job.status, job.error) == (Status.FAILED, LEAVING)


@pytest.mark.parametrize(("said", "left"), [("retry", Status.IN_PROGRESS), ("fail", Status.FAILED)])
def test_what_becomes_of_jobs_when_the_engine_dies(said: str, left: Status) -> None:
    """Those that have said something fail; the others are left to the platform if that is wanted."""
    with running_worker(Behaviour(), ON_ENGINE_DEATH=said) as (server, worker):
        silent, hanging = submit(server, {"hang": True, "silent": True}), submit(server, {"hang": True})
        server.wait_until(lambda _: hanging.chunks and silent.status is Status.IN_PROGRESS)
        dying = submit(server, {"die": True})
        began = time.monotonic()
        assert worker.wait(timeout=20) == 1
        assert time.monotonic() - began < 5
        assert [job.status for job in (silent, hanging, dying)] == [left, Status.FAILED, Status.FAILED]
        assert hanging.error == ENGINE_DIED


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_worker_ends_what_runs_and_takes_nothing_more(number: signal.Signals) -> None:
    with running_worker(Behaviour()) as (server, worker):
        job = submit(server, {"sleep": 0.5})
        server.wait_until(lambda _: job.status is Status.IN_PROGRESS)
        worker.send_signal(number)
        assert worker.wait(timeout=20) == 0
        assert job.status is Status.COMPLETED
        late = httpx.post(f"{server.endpoint_url}/run", json={"input": {"count": 1}}).json()
        assert server.platform.jobs[late["id"]].status is Status.IN_QUEUE


def test_a_worker_whose_engine_has_died_answers_what_it_has_and_leaves() -> None:
    with running_worker(Behaviour()) as (server, worker):
        running, job = submit(server, {"sleep": 0.3}), submit(server, {"die": True})
        assert worker.wait(timeout=20) == 1
        assert finished(server, running, job) == [Status.COMPLETED, Status.FAILED]


def test_jobs_that_are_nested_too_deeply_are_survived() -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    with running_worker(Behaviour(faults={"take": [Fault(status=200, body=deep)]})) as (server, _):
        assert finished(server, submit(server, {"count": 1})) == [Status.COMPLETED]
