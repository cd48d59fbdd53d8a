"""Batches as jobs, over real sockets: the platform's stand-in, the SDK, and a scripted engine that takes its time."""

import gzip
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from standin import Behaviour, Job, Platform, StandinServer, Status, WorkerProcess, worker_environment
from tests.support.batches import custom_ids, jsonl
from tests.support.s3 import LinkServer
from tests.support.tiny import ROOT

SECONDS = 60.0
COMMAND = [sys.executable, "-P", str(ROOT / "tests/platform/stream_worker.py")]
ENDLESS = 100_000
"""A number of events that takes longer than any test."""


@contextmanager
def running_worker(server: StandinServer, volume: Path, **settings: str) -> Iterator[WorkerProcess]:
    """Run a worker whose network volume is `volume`, which need not exist."""
    environment = {
        **worker_environment(server.port),
        "PYTHONPATH": str(ROOT),
        "MEDIA_ALLOW_PRIVATE_NETWORKS": "true",
        "BASE_PATH": str(volume),
        **settings,
    }
    before = len(server.platform.records.takes)
    with (volume.parent / "worker.log").open("ab") as log, WorkerProcess(COMMAND, environment, log) as worker:
        server.wait_until(lambda platform: len(platform.records.takes) > before, SECONDS)
        yield worker


@pytest.fixture(scope="module")
def server() -> Iterator[StandinServer]:
    with StandinServer(Platform(Behaviour(take_hold=5))) as server:
        yield server


@pytest.fixture(scope="module")
def volume(server: StandinServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The volume of a worker that runs during all tests that need only one."""
    folder = tmp_path_factory.mktemp("worker") / "volume"
    folder.mkdir()
    with running_worker(server, folder):
        yield folder


@pytest.fixture(scope="module")
def links() -> Iterator[LinkServer]:
    with LinkServer() as server:
        yield server


def lines(count: int, events: int = 1, first: int = 0) -> list[Any]:
    url = "/v1/completions"
    return [
        {"custom_id": f"id-{number}", "method": "POST", "url": url, "body": {"events": events}}
        for number in range(first, first + count)
    ]


def submit(server: StandinServer, batch: Any, **fields: Any) -> Job:
    return server.call(server.platform.submit, {"input": {"batch": batch, **fields}})


def output(server: StandinServer, job: Job) -> Any:
    """Return the output of a batch, once it has ended."""
    server.wait_until(lambda _: job.ended, SECONDS)
    assert (job.status, job.error) == (Status.COMPLETED, None)
    (value,) = job.output
    return value


def failure(server: StandinServer, batch: Any, **fields: Any) -> Any:
    """Return the error of a batch that fails."""
    job = submit(server, batch, **fields)
    server.wait_until(lambda _: job.ended, SECONDS)
    assert job.status is Status.FAILED
    return json.loads(job.error)


def wait_for_results(path: Path, count: int) -> None:
    """Wait until a batch has this many results in its journal."""
    part = path.with_name(f"{path.name}.part")
    deadline = time.monotonic() + SECONDS
    while not part.exists() or part.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_small_batch_comes_back_inline_in_the_order_of_its_input(server: StandinServer, volume: Path) -> None:
    items = [*lines(3, events=20), *lines(3, first=3), {"custom_id": "wrong", "url": "/v1/models", "body": {}}]
    value = output(server, submit(server, {"input": items}))
    results = value.pop("results")
    assert value.pop("seconds") > 0
    assert value == {
        "completed": 6,
        "failed": 1,
        "total": 7,
        "tokens": {"input": 0, "output": 0},
        "errors": None,
    }
    assert [result["custom_id"] for result in results] == [*(f"id-{number}" for number in range(6)), "wrong"]
    assert [(result["response"] or {}).get("status_code") for result in results] == [200] * 6 + [None]
    assert results[-1]["error"]["code"] == "invalid_url"
    assert [path.name for path in (volume / "batches").iterdir()]


def test_paths_on_the_volume_are_relative_to_it(server: StandinServer, volume: Path) -> None:
    (volume / "in.jsonl").write_bytes(jsonl([*lines(5), "no object"]))
    batch = {"input": "in.jsonl", "output": "new/out.jsonl", "errors": str(volume / "new/errors.jsonl")}
    value = output(server, submit(server, batch))
    assert (value["output"], value["errors"]) == (str(volume / "new/out.jsonl"), str(volume / "new/errors.jsonl"))
    assert custom_ids(volume / "new/out.jsonl") == [f"id-{number}" for number in range(5)]
    assert custom_ids(volume / "new/errors.jsonl") == [None]
    assert "another batch" in failure(server, {"input": lines(1), "output": "new/out.jsonl"})["message"]


def test_links_lead_to_the_input_and_take_the_output(server: StandinServer, volume: Path, links: LinkServer) -> None:
    link = links.hold("in.jsonl.gz", gzip.compress(jsonl(lines(20))))
    value = output(server, submit(server, {"input": link, "output": f"{links.url}/up/out?Signature=x"}))
    assert value["result_url"] == f"{links.url}/up/out"
    results = [json.loads(line) for line in links.uploads["/up/out"].splitlines()]
    assert [result["custom_id"] for result in results] == [f"id-{number}" for number in range(20)]
    assert not list(volume.rglob(".*.input"))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        pytest.param([], "'batch' must be an object", id="no object"),
        pytest.param({}, "'batch.input' is missing", id="no input"),
        pytest.param({"input": lines(1), "into": "x"}, "'batch.into' is an unknown field", id="unknown field"),
        pytest.param({"input": "none.jsonl"}, "does not exist", id="no such file"),
        pytest.param({"input": "../../etc/passwd"}, "must not lead out of it", id="out of the volume"),
        pytest.param({"input": lines(1), "output": "out.py"}, "must end with '.jsonl'", id="no results"),
        pytest.param({"input": [1, "x"]}, "Line 1: The line must be a JSON object", id="no requests"),
        pytest.param({"input": lines(1), "order": "any"}, "'batch.order' is wrong", id="order"),
    ],
)
def test_a_wrong_batch_fails_at_once_with_its_mistakes(
    server: StandinServer, volume: Path, batch: Any, message: str
) -> None:
    del volume
    error = failure(server, batch)
    assert (error["code"], message in error["message"]) == (400, True), error


def test_the_link_to_the_input_must_lead_to_a_batch(server: StandinServer, volume: Path, links: LinkServer) -> None:
    assert "no batch" in failure(server, {"input": links.hold("page.html", b"<html>")})["message"]
    error = failure(server, {"input": f"{links.url}/nothing"})
    assert error["message"] == "'batch.input': the link's server answered with HTTP status 404."
    error = failure(server, {"input": lines(1), "output": f"{links.url}/status/403"})
    assert error["message"].startswith("'batch.output': the link's server answered with HTTP status 403. The results")
    assert not list(volume.rglob(".*.input"))


def test_the_status_shows_the_progress(server: StandinServer, volume: Path) -> None:
    del volume
    job = submit(server, {"input": [*lines(2), *lines(2, ENDLESS, first=2)]})
    server.wait_until(lambda _: job.output and job.output.get("done") == 2, SECONDS)
    status = httpx.get(f"{server.endpoint_url}/status/{job.id}").json()
    assert status["status"] == "IN_PROGRESS"
    assert (status["output"]["total"], status["output"]["percent"]) == (4, 50.0)
    second = submit(server, {"input": lines(1)})
    server.wait_until(lambda _: second.output, SECONDS)
    assert second.output["status"] == "waiting"
    server.call(server.platform.cancel, job)
    assert output(server, second)["completed"] == 1


def test_a_batch_takes_no_place_of_other_jobs(server: StandinServer, volume: Path) -> None:
    del volume
    batch = submit(server, {"input": lines(4, ENDLESS)})
    server.wait_until(lambda _: batch.output, SECONDS)
    jobs = [server.call(server.platform.submit, {"input": {"prompt": "x", "events": 10}}) for _ in range(4)]
    server.wait_until(lambda _: all(job.ended for job in jobs), SECONDS)
    assert [job.status for job in jobs] == [Status.COMPLETED] * 4
    server.call(server.platform.cancel, batch)


def test_a_cancelled_batch_leaves_what_ended_and_goes_on_if_it_is_given_again(
    server: StandinServer, volume: Path
) -> None:
    items, path = [*lines(10), *lines(4, 150, first=10)], volume / "cancelled.jsonl"
    job = submit(server, {"input": items, "output": "cancelled.jsonl"})
    wait_for_results(path, 10)
    began = time.monotonic()
    server.call(server.platform.cancel, job)
    while not path.exists():
        time.sleep(0.01)
    assert time.monotonic() - began < 5
    assert custom_ids(path) == [f"id-{number}" for number in range(10)]
    server.call(server.platform.give_again, job)
    assert output(server, job)["total"] == 14
    assert custom_ids(path) == [f"id-{number}" for number in range(14)]
    assert not path.with_name("cancelled.jsonl.part").exists()
    # A job that has ended is not run again.
    server.call(server.platform.give_again, job)
    assert output(server, job)["seconds"] < 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_another_worker_goes_on_where_one_was_stopped(tmp_path: Path, number: int) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    path = volume / "out.jsonl"
    with StandinServer(Platform(Behaviour(take_hold=5))) as server:
        with running_worker(server, volume) as worker:
            job = submit(server, {"input": [*lines(200), *lines(16, 30, first=200)], "output": "out.jsonl"})
            wait_for_results(path, 50)
            worker.send_signal(number)
            worker.wait(timeout=20)
        assert job.status is Status.IN_PROGRESS
        with running_worker(server, volume):
            server.call(server.platform.give_again, job)
            assert output(server, job)["completed"] == 216
    assert custom_ids(path) == [f"id-{number}" for number in range(216)]
    assert server.platform.records.done_posts == 1


def test_a_line_that_kills_every_engine_does_not_stop_the_batch_for_ever(tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    deadly = {**lines(1, ENDLESS)[0], "custom_id": "deadly", "body": {"die": True}}
    with StandinServer(Platform(Behaviour(take_hold=5))) as server:
        with running_worker(server, volume) as worker:
            job = submit(server, {"input": [*lines(20), deadly, *lines(20, first=20)], "output": "out.jsonl"})
            assert worker.wait(timeout=20) == 1
        for _ in range(2):
            with running_worker(server, volume) as worker:
                server.call(server.platform.give_again, job)
                assert worker.wait(timeout=20) == 1
        assert job.status is Status.IN_PROGRESS
        with running_worker(server, volume):
            server.call(server.platform.give_again, job)
            value = output(server, job)
    assert (value["completed"], value["failed"]) == (40, 1)
    results = {
        result["custom_id"]: result for result in map(json.loads, (volume / "out.jsonl").read_text().splitlines())
    }
    assert results["deadly"]["error"]["code"] == "engine_died"
    assert [path.name for path in volume.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(
    ("setting", "status"),
    [
        pytest.param("fail", Status.FAILED, id="it fails"),
        pytest.param("leave", Status.IN_PROGRESS, id="it is left"),
    ],
)
def test_without_a_volume_a_stopped_worker_fails_its_batch(tmp_path: Path, setting: str, status: Status) -> None:
    with StandinServer(Platform(Behaviour(take_hold=5))) as server:
        with running_worker(server, tmp_path / "none", UNFINISHED_JOBS=setting) as worker:
            error = failure(server, {"input": "in.jsonl"})
            assert "no network volume" in error["message"]
            assert output(server, submit(server, {"input": lines(3)}))["completed"] == 3
            job = submit(server, {"input": lines(3, ENDLESS)})
            server.wait_until(lambda _: job.output, SECONDS)
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(timeout=20) == 0
        assert job.status is status
