"""The queue on a bad day, over real sockets: late answers, outages, several workers, repeated and forgotten jobs.

The waits have limits that suit any machine. OUTAGE_SECONDS makes the outage longer than the default of a few seconds.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby, pairwise
from typing import Any

import pytest

from standin import Behaviour, Fault, Job, Platform, StandinServer, Status, WorkerProcess, worker_environment
from tests.support.tiny import ROOT

OUTAGE_SECONDS = float(os.environ.get("OUTAGE_SECONDS", "3"))
SECONDS = 30.0
"""The limit of each wait."""
COMMAND = [sys.executable, "-P", str(ROOT / "tests/platform/stream_worker.py")]


@contextmanager
def workers(behaviour: Behaviour | None = None, count: int = 1, **environment: str) -> Iterator[StandinServer]:
    """Run workers on one queue, and wait until each has asked for a job."""
    with StandinServer(Platform(behaviour)) as server, ExitStack() as running:
        for number in range(count):
            variables = worker_environment(server.port, worker_id=f"worker-{number}")
            process = WorkerProcess(COMMAND, {**variables, "PYTHONPATH": str(ROOT), **environment})
            running.enter_context(process)
        server.wait_until(lambda platform: len(platform.ready_workers()) == count, SECONDS)
        yield server


def submit(server: StandinServer, **body: Any) -> Job:
    """Submit a job for the scripted engine."""
    return server.call(server.platform.submit, {"input": {"prompt": "x", **body}})


def submit_stream(server: StandinServer, **body: Any) -> Job:
    """Submit a stream, and wait for its first part."""
    job = submit(server, stream=True, **body)
    server.wait_until(lambda _: job.chunks, SECONDS)
    return job


def wait_completed(server: StandinServer, *jobs: Job) -> None:
    server.wait_until(lambda _: all(job.ended for job in jobs), SECONDS)
    assert [job.status for job in jobs] == [Status.COMPLETED] * len(jobs)


def cancel(server: StandinServer, job: Job) -> None:
    """Cancel a job, and wait until the worker has stopped it. Only then it listens for the next stop."""

    async def cancelled(platform: Platform) -> None:
        requests = platform.records.requests["stop"]
        platform.cancel(job)
        await platform.until(lambda _: job.id in platform.records.stop_signals)
        answered = len(requests)
        await platform.until(lambda _: len(requests) > answered)

    server.start(cancelled(server.platform)).result(SECONDS)


def numbers(outputs: Any) -> list[int]:
    """Return the numbers of all events in a job's outputs, which are lists of objects or SSE text."""
    if all(isinstance(output, str) for output in outputs):
        events = "".join(outputs).removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]
        return [json.loads(event.removeprefix("data: "))["n"] for event in events]
    return [chunk["n"] for output in outputs for chunk in output]


def test_streams_with_late_answers_use_few_connections() -> None:
    with workers(Behaviour(answer_delay=0.05)) as server:
        for _ in range(4):
            wait_completed(server, submit(server, stream=True, events=25))
        records = server.platform.records
        assert records.stream_posts >= 8
        assert len(records.post_connections) <= 4


@pytest.mark.timeout(OUTAGE_SECONDS + 120)
def test_an_outage_from_the_first_second_loses_no_stream() -> None:
    with workers() as server:
        body = {"prompt": "x", "stream": True, "events": 200}
        inputs = [body, {"openai_route": "/v1/completions", "openai_input": body}, body]
        jobs = [server.call(server.platform.submit, {"input": job_input}) for job_input in inputs]
        server.wait_until(lambda _: all(job.chunks for job in jobs), SECONDS)
        outage = server.outage(OUTAGE_SECONDS)
        assert {job.status for job in jobs} == {Status.IN_PROGRESS}
        outage.result()
        wait_completed(server, *jobs)
        for job in jobs:
            assert numbers(job.output) == list(range(200))
            # A part whose answer was lost at the start of the outage may come twice.
            assert [chunk for chunk, _ in groupby(job.chunks)] == job.output


def test_two_workers_share_jobs_that_arrive_at_once() -> None:
    # One worker has places and memory for all jobs.
    with workers(count=2, MAX_CONCURRENCY="128", MAX_TOTAL_REQUEST_BYTES="10000000000") as server:
        # Each request begins after half a second, so a worker that the machine delays still takes its share.
        request = {"input": {"prompt": "x", "delay": 0.5, "events": 25}}
        jobs = server.call(lambda: [server.platform.submit(request) for _ in range(96)])
        wait_completed(server, *jobs)
        taken = server.platform.jobs_per_worker()
        assert min(taken.values()) >= 30, taken


@pytest.mark.parametrize("linger", [0, 0.5])
def test_a_job_that_is_stopped_and_given_again_is_answered(linger: float) -> None:
    """With `linger`, its first run has not ended when it is given again."""
    with workers() as server:
        job = submit_stream(server, linger=linger)
        cancel(server, job)
        job.request = {"input": {"prompt": "x", "stream": True, "events": 5}}
        server.call(server.platform.give_again, job)
        wait_completed(server, job)
        assert numbers(job.output) == list(range(5))


def test_a_job_that_is_given_again_before_its_stop_arrives_is_answered() -> None:
    with workers() as server:
        job = submit_stream(server)
        server.platform.behaviour.faults["stop"] = [Fault(delay=1)]
        # Ends the poll that waits already. The next one is answered late.
        server.call(server.platform.cancel, submit_stream(server))
        server.wait_until(lambda platform: not platform.behaviour.faults["stop"], SECONDS)
        job.request = {"input": {"prompt": "x", "stream": True, "events": 5}}

        def stop_and_give_again() -> None:
            server.platform.cancel(job)
            server.platform.give_again(job)

        server.call(stop_and_give_again)
        server.wait_until(lambda platform: job.id in platform.records.stop_signals, SECONDS)
        wait_completed(server, job)
        assert numbers(job.output) == list(range(5))


def test_a_stop_that_is_repeated_without_end_is_asked_for_at_a_bounded_rate() -> None:
    with workers(Behaviour(repeat_stops=True), MAX_CONCURRENCY="1") as server:
        cancel(server, submit_stream(server))
        requests = server.platform.records.requests["stop"]
        first = len(requests)
        server.wait_until(lambda _: len(requests) > first + 10, SECONDS)
        assert requests[first + 10] - requests[first] > 1
        # With one place, the next job begins when the one before has been stopped.
        cancel(server, submit_stream(server))
        wait_completed(server, submit(server, events=1))


def test_a_stream_whose_job_is_forgotten_is_cancelled_in_the_engine() -> None:
    with workers(MAX_CONCURRENCY="1") as server:
        server.call(server.platform.forget, submit_stream(server))
        job = submit(server, events=1)
        wait_completed(server, job)
        assert job.output == [{"waiting": 0, "running": 1}]


def test_after_429_the_worker_waits_before_it_asks_for_jobs_again() -> None:
    with workers() as server:
        requests = server.platform.records.requests["take"]

        def refuse_the_next() -> int:
            server.platform.behaviour.faults["take"] = [Fault(status=429)]
            return len(requests)

        refused = server.call(refuse_the_next)
        # The first job ends the request that waits already.
        wait_completed(server, submit(server, events=1), submit(server, events=1))
        assert requests[refused + 1] - requests[refused] > 4


def test_jobs_that_arrive_long_after_the_head_of_the_answer_are_not_lost() -> None:
    with workers() as server:
        server.platform.behaviour.faults["take"] = [Fault(answer_delay=1.5)]
        jobs = [submit(server, events=1) for _ in range(3)]
        wait_completed(server, *jobs)
        assert max(job.done - job.taken for job in jobs if job.done and job.taken) > 1.4


def test_the_pings_of_many_jobs_have_short_urls() -> None:
    with workers(MAX_CONCURRENCY="250") as server:
        request = {"input": {"prompt": "x"}}
        jobs = server.call(lambda: [server.platform.submit(request, sync=True) for _ in range(250)])
        ids, pings = {job.id for job in jobs}, server.platform.records.pings
        assert {len(job_id) for job_id in ids} == {44}
        server.wait_until(lambda _: any({*a.job_ids, *b.job_ids} == ids for a, b in pairwise(pings)), SECONDS)
        assert max(len(server.url) + ping.url_bytes for ping in pings) <= 8192


def test_binary_data_comes_in_base64() -> None:
    with workers() as server:
        job = submit(server, binary=True)
        wait_completed(server, job)
        assert job.output == [{"content_type": "application/octet-stream", "metadata": None, "base64": "/wA="}]


def test_objects_that_only_spaces_would_make_too_large_are_streamed() -> None:
    with workers() as server:
        job = submit(server, stream=True, events=1, zeros=400_000)
        wait_completed(server, job)
        assert job.chunks == job.output == [[{"n": 0, "zeros": [0] * 400_000}]]
        assert server.platform.records.oversized_posts == []


@pytest.mark.parametrize("status", [400, 413])
def test_a_job_whose_result_the_platform_finds_too_large_fails(status: int) -> None:
    with workers(Behaviour(done_post_limit=100_000, done_refusal_status=status)) as server:
        job = submit(server, stream=True, events=1, zeros=100_000)
        server.wait_until(lambda _: job.ended, SECONDS)
        assert (job.status, server.platform.records.oversized_posts) == (Status.FAILED, [job.id])
        assert f"(HTTP {status})" in job.error
