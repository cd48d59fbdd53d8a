"""The worker's job loop, without an engine, with the platform's stand-in and faults of it."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
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
from tests.conftest import have_ended
from tests.support.tiny import ROOT
from worker.errors import ENGINE_DIED, LEAVING
from worker.queue.platform import FORGOTTEN_ANSWERS

LEFT = [("leave", Status.IN_PROGRESS), ("fail", Status.FAILED)]
"""The values of UNFINISHED_JOBS, and the status of a job without output after its worker has ended."""
COMMAND = [sys.executable, "-P", str(ROOT / "standin/echo_worker.py"), "event"]


@contextmanager
def running_worker(behaviour: Behaviour, **environment: str) -> Iterator[tuple[StandinServer, WorkerProcess]]:
    with StandinServer(Platform(behaviour)) as server:
        environment = {**worker_environment(server.port), "PYTHONPATH": str(ROOT), **environment}
        with WorkerProcess(COMMAND, environment) as worker:
            server.wait_until(lambda platform: platform.records.takes)
            yield server, worker


@pytest.fixture(scope="module")
def shared() -> Iterator[StandinServer]:
    with running_worker(Behaviour(take_hold=5)) as (server, _):
        yield server


@pytest.fixture
def server(shared: StandinServer) -> StandinServer:
    """The shared stand-in with default behaviour and empty records, while its worker waits for a job."""
    shared.platform.behaviour = Behaviour(take_hold=5)
    shared.platform.records = Records()
    shared.wait_until(lambda platform: platform.waiting_workers())
    return shared


def submit(server: StandinServer, job_input: Any) -> Job:
    return server.call(server.platform.submit, {"input": job_input})


def submit_hanging(server: StandinServer, count: int) -> list[Job]:
    """Submit jobs that run until they are cancelled, and wait until all of them run."""
    jobs = [submit(server, {"hang": True}) for _ in range(count)]
    server.wait_until(lambda _: all(job.status is Status.IN_PROGRESS for job in jobs))
    return jobs


def cancel(server: StandinServer, *jobs: Job) -> None:
    for job in jobs:
        server.call(server.platform.cancel, job)


def final_statuses(server: StandinServer, *jobs: Job) -> list[Status]:
    """Wait until the jobs have ended, and return their statuses."""
    server.wait_until(lambda _: all(job.status not in (Status.IN_QUEUE, Status.IN_PROGRESS) for job in jobs))
    return [job.status for job in jobs]


def test_the_parts_of_a_job_are_posted_in_order_and_its_result_once(server: StandinServer) -> None:
    job = submit(server, {"count": 5})
    assert final_statuses(server, job) == [Status.COMPLETED]
    assert job.output == [f"part {number}" for number in range(5)]
    assert (server.platform.records.stream_posts, server.platform.records.done_posts) == (5, 1)


@pytest.mark.parametrize(
    ("job_input", "error"),
    [
        pytest.param({"error": "no"}, "no", id="error"),
        pytest.param({"error": '{"code": 400}'}, '{"code": 400}', id="JSON"),
    ],
)
def test_the_error_of_a_failed_job_is_posted_unchanged(server: StandinServer, job_input: Any, error: str) -> None:
    job = submit(server, job_input)
    assert final_statuses(server, job) == [Status.FAILED]
    assert job.error == error


def test_as_many_jobs_run_as_there_are_slots(server: StandinServer) -> None:
    hanging = submit_hanging(server, CONCURRENCY)
    late = submit(server, {"count": 1})
    time.sleep(0.3)
    assert late.status is Status.IN_QUEUE
    cancel(server, hanging[0])
    assert final_statuses(server, late) == [Status.COMPLETED]
    cancel(server, *hanging[1:])


def test_the_worker_takes_jobs_while_others_run(server: StandinServer) -> None:
    (hanging,) = submit_hanging(server, 1)
    assert final_statuses(server, submit(server, {"count": 1})) == [Status.COMPLETED]
    assert hanging.status is Status.IN_PROGRESS
    server.wait_until(lambda platform: any(hanging.id in ping.job_ids for ping in platform.records.pings))
    cancel(server, hanging)


def stopped_jobs(server: StandinServer) -> list[str]:
    """Return the ids of the jobs that the handler saw being stopped."""
    job = submit(server, {"stopped": True})
    assert final_statuses(server, job) == [Status.COMPLETED]
    ids: list[str] = job.output[0]
    return ids


def test_a_stop_signal_reaches_the_handler(server: StandinServer) -> None:
    job = submit(server, {"hang": True})
    server.wait_until(lambda _: job.chunks)
    cancel(server, job)
    server.wait_until(lambda platform: job.id in platform.records.stop_signals)
    assert job.id in stopped_jobs(server)
    assert server.platform.records.done_posts == 1


def test_a_stopped_job_frees_its_slot_for_a_waiting_one(server: StandinServer) -> None:
    hanging = [submit(server, {"hang": True}) for _ in range(CONCURRENCY)]
    waiting = submit(server, {"count": 1})
    server.wait_until(lambda _: all(job.chunks for job in hanging))
    assert waiting.status is Status.IN_QUEUE
    cancel(server, hanging[0])
    assert final_statuses(server, waiting) == [Status.COMPLETED]
    cancel(server, *hanging[1:])


def test_a_stop_signal_reaches_the_handler_while_a_batch_is_posted(server: StandinServer) -> None:
    server.platform.behaviour.faults["stream"] = [Fault(delay=30)]
    job = submit(server, {"hang": True})
    server.wait_until(lambda platform: not platform.behaviour.faults["stream"])
    cancel(server, job)
    server.wait_until(lambda platform: job.id in platform.records.stop_signals)
    assert job.id in stopped_jobs(server)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(status=500), id="500"),
        pytest.param(Fault(status=200, body=b"<html>garbage"), id="invalid JSON"),
        pytest.param(Fault(status=200, body=b'"text"'), id="text instead of a job"),
        pytest.param(Fault(status=200, body=b'[{"input": {}}, 7]'), id="jobs without an id"),
        pytest.param(Fault(status=204), id="empty at once"),
        pytest.param(Fault(status=400), id="400 at once"),
        pytest.param(Fault(reset=True), id="reset"),
    ],
)
def test_a_failed_job_request_is_repeated_after_a_pause(server: StandinServer, fault: Fault) -> None:
    server.platform.behaviour.faults["take"] = [fault] * 4
    first = submit(server, {"count": 1})  # Ends the long poll that began before the faults were set.
    started = time.monotonic()
    job = submit(server, {"count": 1})
    assert final_statuses(server, first, job) == [Status.COMPLETED] * 2
    server.wait_until(lambda platform: len(platform.behaviour.faults["take"]) == 0)
    # Without pauses four responses take milliseconds. aiohttp itself repeats a request once after a reset.
    assert time.monotonic() - started > 0.1


def test_a_job_whose_empty_input_the_platform_dropped_is_answered(server: StandinServer) -> None:
    job = submit(server, {})
    assert final_statuses(server, job) == [Status.COMPLETED]
    assert job.output == [{"input": None}]


def test_a_job_delivered_twice_is_answered_once(server: StandinServer) -> None:
    server.platform.behaviour.faults["take"] = [Fault(), Fault(duplicate=True)]
    jobs = [submit(server, {"sleep": 0.3}) for _ in range(3)]
    assert final_statuses(server, *jobs) == [Status.COMPLETED] * 3
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
def test_a_result_is_posted_again_after_a_failure(server: StandinServer, kind: Any, fault: Fault) -> None:
    server.platform.behaviour.faults[kind] = [fault, fault]
    job = submit(server, {"count": 3})
    assert final_statuses(server, job) == [Status.COMPLETED]
    assert job.output == ["part 0", "part 1", "part 2"]
    assert [chunk["output"] if isinstance(chunk, dict) else chunk for chunk in job.chunks] == job.output


def test_after_a_refused_part_the_rest_comes_with_the_result(server: StandinServer) -> None:
    server.platform.behaviour.faults["stream"] = [Fault(), Fault(status=422)]
    job = submit(server, {"count": 4})
    assert final_statuses(server, job) == [Status.COMPLETED]
    assert job.chunks == ["part 0"]
    assert job.output == ["part 0", "part 1", "part 2", "part 3"]


@pytest.mark.parametrize("count", [3, 1], ids=["stream", "done"])
def test_after_an_outage_the_platform_gets_every_part_in_order(server: StandinServer, count: int) -> None:
    job = submit(server, {"count": count, "pause": 0.5})
    server.wait_until(lambda _: job.chunks)
    server.platform.behaviour.is_away = True
    server.drop_connections()
    time.sleep(2)
    server.platform.behaviour.is_away = False
    late = submit(server, {"count": 1})
    assert final_statuses(server, job, late) == [Status.COMPLETED] * 2
    assert job.output == ["part 0", "part 1", "part 2"][:count]
    # The answer to the first post may have been lost, so that it was posted again.
    assert list(dict.fromkeys(job.chunks)) == job.output
    assert server.platform.records.duplicate_dones == []


@pytest.mark.parametrize("kind", ["take", "stream", "done", "stop"])
def test_the_worker_continues_after_a_response_that_is_cut_off(server: StandinServer, kind: Any) -> None:
    """Only a job whose delivery was cut off is lost, until the platform's own time limit delivers it again."""
    server.platform.behaviour.faults[kind] = [Fault(cut=True)]
    first = submit(server, {"count": 2})  # Ends the long poll that began before the fault was set.
    server.wait_until(lambda platform: not platform.behaviour.faults[kind] or kind == "stop")
    second = submit(server, {"count": 2})
    server.wait_until(lambda _: second.status is not Status.IN_QUEUE)
    last = submit(server, {"count": 2})
    expected = [first, last] if kind == "take" else [first, second, last]
    assert set(final_statuses(server, *expected)) == {Status.COMPLETED}


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_a_job_fails_if_its_result_is_refused(server: StandinServer, status: int) -> None:
    """An unknown job (404) is tried a few times: the platform may only be late."""
    server.platform.behaviour.faults["done"] = [Fault(status=status)] * (FORGOTTEN_ANSWERS if status == 404 else 1)
    job = submit(server, {"count": 2})
    assert final_statuses(server, job) == [Status.FAILED]
    assert f"(HTTP {status})" in job.error


def test_a_job_with_too_large_a_result_fails_with_advice(server: StandinServer) -> None:
    job = submit(server, {"size": 21_000_000})
    assert final_statuses(server, job) == [Status.FAILED]
    assert "Ask for fewer tokens" in job.error
    assert "BUCKET_ENDPOINT_URL or RESULT_FOLDER" in job.error
    server.platform.behaviour.faults["done"] = [Fault(status=413)]
    job = submit(server, {"size": 2_000_000})
    assert final_statuses(server, job) == [Status.FAILED]
    assert server.platform.records.oversized_posts == []


def test_a_large_result_is_posted_only_at_the_end(server: StandinServer) -> None:
    job = submit(server, {"size": 2_000_000})
    assert final_statuses(server, job) == [Status.COMPLETED]
    assert (len(job.output[0]), job.chunks) == (2_000_000, [])


@pytest.mark.parametrize(("unfinished_jobs", "status"), LEFT)
def test_jobs_without_output_are_left_to_the_platform_after_the_grace_period(
    unfinished_jobs: str, status: Status
) -> None:
    with running_worker(Behaviour(), UNFINISHED_JOBS=unfinished_jobs, DRAIN_SECONDS="0.5") as (server, worker):
        silent, hanging = submit(server, {"hang": True, "silent": True}), submit(server, {"hang": True})
        server.wait_until(lambda _: hanging.chunks and silent.status is Status.IN_PROGRESS)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=20) == 0
        assert [job.status for job in (silent, hanging)] == [status, Status.FAILED]
        assert hanging.error == LEAVING


@pytest.mark.parametrize("silent", [True, False])
def test_jobs_that_outlast_the_grace_period_fail_with_the_reason(silent: bool) -> None:
    with running_worker(Behaviour(), DRAIN_SECONDS="0.5") as (server, worker):
        job = submit(server, {"hang": True, "silent": silent})
        server.wait_until(lambda _: job.status is Status.IN_PROGRESS)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=20) == 0
        assert (job.status, job.error) == (Status.FAILED, LEAVING)


@pytest.mark.parametrize(("unfinished_jobs", "status"), LEFT)
def test_jobs_without_output_are_left_to_the_platform_when_the_engine_dies(
    unfinished_jobs: str, status: Status
) -> None:
    with running_worker(Behaviour(), UNFINISHED_JOBS=unfinished_jobs) as (server, worker):
        silent, hanging = submit(server, {"hang": True, "silent": True}), submit(server, {"hang": True})
        server.wait_until(lambda _: hanging.chunks and silent.status is Status.IN_PROGRESS)
        dying = submit(server, {"die": True})
        began = time.monotonic()
        assert worker.wait(timeout=20) == 1
        assert time.monotonic() - began < 5
        assert [job.status for job in (silent, hanging, dying)] == [status, Status.FAILED, Status.FAILED]
        assert hanging.error == ENGINE_DIED


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_worker_completes_running_jobs_and_takes_no_more(number: signal.Signals) -> None:
    with running_worker(Behaviour()) as (server, worker):
        job = submit(server, {"sleep": 0.5})
        server.wait_until(lambda _: job.status is Status.IN_PROGRESS)
        worker.send_signal(number)
        assert worker.wait(timeout=20) == 0
        assert job.status is Status.COMPLETED
        late = httpx.post(f"{server.endpoint_url}/run", json={"input": {"count": 1}}).json()
        assert server.platform.jobs[late["id"]].status is Status.IN_QUEUE


def test_a_killed_worker_sends_no_pings() -> None:
    with running_worker(Behaviour()) as (server, worker):
        server.wait_until(lambda platform: platform.records.pings)
        children = psutil.Process(worker.pid).children()
        assert children
        worker.send_signal(signal.SIGKILL)
        worker.wait(timeout=20)
        assert have_ended(children)


def test_a_worker_whose_engine_has_died_answers_its_jobs_and_exits() -> None:
    with running_worker(Behaviour()) as (server, worker):
        running, job = submit(server, {"sleep": 0.3}), submit(server, {"die": True})
        assert worker.wait(timeout=20) == 1
        assert final_statuses(server, running, job) == [Status.COMPLETED, Status.FAILED]


def test_the_worker_continues_after_jobs_that_are_nested_too_deeply() -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    with running_worker(Behaviour(faults={"take": [Fault(status=200, body=deep)]})) as (server, _):
        assert final_statuses(server, submit(server, {"count": 1})) == [Status.COMPLETED]
