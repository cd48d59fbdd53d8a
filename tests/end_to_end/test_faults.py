"""Faults of the platform and of clients, with the real worker: no job is lost or answered twice."""

import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from standin import Behaviour, Fault, Job, Records, Status
from tests.conftest import REQUEST_SECONDS, Endpoint, HttpWorker
from tests.support.freezing import frozen
from tests.support.media import COLOURS, image_url

STORY: dict[str, Any] = {"prompt": "Once", "max_tokens": 60, "ignore_eos": True}


@pytest.fixture
def faulty(endpoint: Endpoint) -> Iterator[Endpoint]:
    """The endpoint with new behaviour and records for each test."""
    platform = endpoint.server.platform
    behaviour, records = platform.behaviour, platform.records
    platform.behaviour, platform.records = Behaviour(), Records(takes=records.takes, pings=records.pings)
    yield endpoint
    platform.behaviour, platform.records = behaviour, records


def submit(endpoint: Endpoint, job_input: Any) -> Job:
    return endpoint.server.call(endpoint.server.platform.submit, {"input": job_input})


def metric(endpoint: Endpoint, name: str) -> float:
    """Return the value of a metric of the worker."""
    lines = httpx.get(f"http://127.0.0.1:{endpoint.metrics_port}/metrics", timeout=10).text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def assert_each_ended_once(endpoint: Endpoint, jobs: list[Job], *, cancelled: bool = False) -> None:
    endpoint.server.wait_until(lambda _: all(job.ended for job in jobs), timeout=90)
    allowed = {Status.COMPLETED, Status.CANCELLED} if cancelled else {Status.COMPLETED}
    assert {job.status for job in jobs} <= allowed
    for job in jobs:
        if job.status is Status.COMPLETED and job.request["input"].get("stream"):
            assert job.output == job.chunks
    records = endpoint.server.platform.records
    stopped = {job.id for job in jobs if job.status is Status.CANCELLED}
    assert {*records.duplicate_dones, *records.late_streams} <= stopped


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(delay=1.0), id="slow"),
        pytest.param(Fault(status=500), id="500"),
        pytest.param(Fault(status=429), id="429"),
        pytest.param(Fault(status=503, body=b"<html>"), id="garbage"),
        pytest.param(Fault(reset=True), id="reset"),
        pytest.param(Fault(delay=0.3, reset=True), id="late reset"),
    ],
)
def test_no_job_is_lost_or_answered_twice_when_the_platform_has_faults(faulty: Endpoint, fault: Fault) -> None:
    for kind in ("take", "stream", "done", "stop"):
        faulty.server.platform.behaviour.faults[kind] = [fault, Fault(), fault]
    jobs = [submit(faulty, {**STORY, "stream": number % 2 == 0}) for number in range(6)]
    assert_each_ended_once(faulty, jobs)


def test_jobs_delivered_twice_are_answered_once(faulty: Endpoint) -> None:
    faulty.server.platform.behaviour.faults["take"] = [Fault(duplicate=True)] * 4
    first = submit(faulty, STORY)  # Ends the long poll that began before the faults were set.
    jobs = [submit(faulty, {**STORY, "max_tokens": 1500, "stream": True}) for _ in range(3)]
    assert_each_ended_once(faulty, [first, *jobs])


def test_a_platform_that_was_unreachable_gets_every_result(faulty: Endpoint) -> None:
    platform = faulty.server.platform
    jobs = [submit(faulty, {**STORY, "max_tokens": 800, "stream": number % 2 == 0}) for number in range(4)]
    faulty.server.wait_until(lambda _: jobs[0].chunks)
    platform.behaviour.is_away = True
    faulty.server.drop_connections()
    time.sleep(3)
    platform.behaviour.is_away = False
    assert_each_ended_once(faulty, [*jobs, submit(faulty, STORY)])


def test_a_worker_that_was_frozen_continues(faulty: Endpoint) -> None:
    """As when FlashBoot resumes a worker: its connections are dead without a sign, and time has passed."""
    running = submit(faulty, {**STORY, "max_tokens": 800, "stream": True})
    faulty.server.wait_until(lambda _: running.chunks)
    before, pings = metric(faulty, "worker_resumes_total"), faulty.server.platform.records.pings
    with frozen(faulty.worker.pid):
        # What the platform has answered arrives.
        time.sleep(0.3)
        faulty.proxy.lose_connections()
        time.sleep(5)
        pinged = len(pings)
    job = submit(faulty, {**STORY, "max_tokens": 1})
    # A poll that waits on a dead connection would wait for 90 s, and a ping for 2 s.
    faulty.server.wait_until(lambda _: job.ended, timeout=20)
    faulty.server.wait_until(lambda _: len(pings) > pinged, timeout=20)
    stopped = submit(faulty, {**STORY, "max_tokens": 1900, "stream": True})
    faulty.server.wait_until(lambda _: stopped.chunks, timeout=20)
    faulty.server.call(faulty.server.platform.cancel, stopped)
    faulty.server.wait_until(lambda platform: stopped.id in platform.records.stop_signals, timeout=20)
    assert_each_ended_once(faulty, [running, job])
    assert metric(faulty, "worker_resumes_total") >= before + 1
    assert "The worker resumed after it was frozen for" in faulty.log.read_text()


def test_frozen_time_does_not_count_for_the_time_limit_of_a_request(http_worker: HttpWorker) -> None:
    body = {**STORY, "max_tokens": 100, "stream": True}
    with http_worker.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        parts = response.iter_text()
        first = next(parts)
        with frozen(http_worker.worker.pid):
            time.sleep(REQUEST_SECONDS + 1)
        text = first + "".join(parts)
    assert '"error"' not in text
    assert text.endswith("data: [DONE]\n\n")


def test_cancelling_some_of_64_jobs(faulty: Endpoint) -> None:
    rng = random.Random(1)
    jobs = [
        submit(
            faulty,
            {"prompt": "What?", "image": image_url(COLOURS[number % len(COLOURS)]), "stream": True}
            if number % 4 == 0
            else {**STORY, "max_tokens": 300, "stream": number % 2 == 0},
        )
        for number in range(64)
    ]
    for job in rng.sample(jobs, 19):
        time.sleep(rng.uniform(0, 0.1))
        faulty.server.call(faulty.server.platform.cancel, job)
    assert_each_ended_once(faulty, [*jobs, submit(faulty, STORY)], cancelled=True)
    assert sum(job.status is Status.COMPLETED for job in jobs) >= 45


def test_malformed_jobs_among_good_ones(faulty: Endpoint) -> None:
    malformed: list[Any] = [None, 7, [], "text", {"messages": "no list"}, {"openai_route": 1}, {"prompt": {"a": 1}}]
    jobs = [submit(faulty, body) for job_input in malformed for body in (job_input, STORY)]
    faulty.server.wait_until(lambda _: all(job.ended for job in jobs), timeout=60)
    assert [job.status for job in jobs] == [Status.FAILED, Status.COMPLETED] * len(malformed)


def test_a_client_that_stops_reading_does_not_block_others(http_worker: HttpWorker) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {http_worker.key}\r\n"
    body = b'{"prompt": "Once", "max_tokens": 1900, "ignore_eos": true, "stream": true}'
    with socket.create_connection(("127.0.0.1", http_worker.port)) as idle, http_worker.client() as client:
        idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        idle.sendall(f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        for _ in range(5):
            answer = client.post("/v1/completions", json={"model": "tiny", **STORY})
            assert answer.status_code == 200
