"""Streams whose posts take longer than the interval of their events end on time in every case."""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from standin import Behaviour, Job, Platform, StandinServer, Status, WorkerProcess, worker_environment
from tests.support.tiny import ROOT
from worker.errors import ENGINE_DIED, LEAVING

COMMAND = [sys.executable, "-P", str(ROOT / "tests/platform/stream_worker.py")]
DYING_JOB = {"input": {"prompt": "x", "die": True}}


@contextmanager
def streaming(post_delay: float, **environment: str) -> Iterator[tuple[StandinServer, WorkerProcess, Job, Job]]:
    """Run a worker with two streams, one of objects and one of SSE text."""
    with StandinServer(Platform(Behaviour(post_delay=post_delay))) as server:
        environment = {**worker_environment(server.port), "PYTHONPATH": str(ROOT), **environment}
        with WorkerProcess(COMMAND, environment) as worker:
            body = {"prompt": "Once", "stream": True}
            inputs = [body, {"openai_route": "/v1/completions", "openai_input": body}]
            objects, text = [server.call(server.platform.submit, {"input": job_input}) for job_input in inputs]
            server.wait_until(lambda _: objects.chunks and text.chunks)
            yield server, worker, objects, text


def check_ends(objects: Job, text: Job, message: str) -> None:
    """Check that both jobs ended with the message, and that their chunks arrived in order without gaps."""
    assert (objects.status, text.status) == (Status.FAILED, Status.COMPLETED)
    assert message in json.loads(objects.error)["message"]
    assert message in "".join(text.output)
    numbers = [chunk["n"] for chunks in objects.chunks for chunk in chunks if "n" in chunk]
    assert numbers == list(range(len(numbers)))
    assert text.chunks == text.output


@pytest.mark.parametrize("post_delay", [0.2, 0.8])
def test_a_stream_with_slow_posts_ends_at_its_deadline(post_delay: float) -> None:
    with streaming(post_delay, REQUEST_TIMEOUT="1.5") as (server, _, objects, text):
        server.wait_until(lambda _: objects.status is Status.FAILED and text.status is Status.COMPLETED)
        check_ends(objects, text, "REQUEST_TIMEOUT=1.5")


def test_a_stream_with_slow_posts_ends_when_the_worker_is_stopped() -> None:
    with streaming(0.2, DRAIN_SECONDS="0.5") as (_, worker, objects, text):
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=20) == 0
        check_ends(objects, text, LEAVING)


@pytest.mark.parametrize("post_delay", [0.2, 0.8])
def test_a_stream_with_slow_posts_ends_when_the_engine_dies(post_delay: float) -> None:
    with streaming(post_delay) as (server, worker, objects, text):
        server.call(server.platform.submit, DYING_JOB)
        assert worker.wait(timeout=20) == 1
        check_ends(objects, text, ENGINE_DIED)


def test_the_engines_death_ends_the_wait_of_a_stopped_worker() -> None:
    with streaming(0.0, DRAIN_SECONDS="30") as (server, worker, objects, text):
        dying = server.call(server.platform.submit, DYING_JOB)
        server.wait_until(lambda _: dying.status is Status.IN_PROGRESS)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=20) == 1
        server.wait_until(lambda _: dying.status is not Status.IN_PROGRESS)
        check_ends(objects, text, ENGINE_DIED)
