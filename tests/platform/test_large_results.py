"""Jobs with large inputs and results, over real sockets: the platform's stand-in, the SDK, and a scripted engine."""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from standin import Behaviour, Job, Platform, StandinServer, Status, WorkerProcess, worker_environment
from tests.support.s3 import LinkServer, S3Server, s3_server
from tests.support.tiny import ROOT

SECONDS = 60.0
SIZE = 21_000_000
"""Characters of a result that is larger than RunPod accepts."""
EXPECTED = json.dumps([{"text": "x" * SIZE}], separators=(",", ":")).encode()
COMMAND = [sys.executable, "-P", str(ROOT / "tests/platform/stream_worker.py")]
SECRET = "secret-that-no-log-may-hold"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def links() -> Iterator[LinkServer]:
    with LinkServer() as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The worker's folder for results."""
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "worker.log"


@pytest.fixture(scope="module")
def server(folder: Path, log: Path) -> Iterator[StandinServer]:
    """A stand-in with one worker. It starts once, which takes a second."""
    with StandinServer(Platform(Behaviour(take_hold=5))) as server, log.open("wb") as output:
        environment = {
            **worker_environment(server.port),
            "PYTHONPATH": str(ROOT),
            "MEDIA_ALLOW_PRIVATE_NETWORKS": "true",
            "RESULT_FOLDER": str(folder),
        }
        with WorkerProcess(COMMAND, environment, output):
            server.wait_until(lambda platform: platform.ready_workers(), SECONDS)
            yield server


def finished(server: StandinServer, job_input: Any, **request: Any) -> Job:
    job = server.call(server.platform.submit, {"input": job_input, **request})
    server.wait_until(lambda _: job.ended, SECONDS)
    return job


def check(job: Job, key: str) -> str:
    """Check the output of a job whose result was stored, and return where it is."""
    assert job.status is Status.COMPLETED, job.error
    place: str = job.output.pop(key)
    digest = hashlib.sha256(EXPECTED).hexdigest()
    assert job.output == {"bytes": len(EXPECTED), "sha256": digest, "content_type": "application/json"}
    return place


def test_a_result_of_21_mb_is_in_the_bucket_of_the_jobs_s3_config(server: StandinServer, s3: S3Server) -> None:
    with s3.locked():
        job = finished(server, {"prompt": "x", "size": SIZE}, s3Config=s3.config)
    assert httpx.get(check(job, "result_url")).content == EXPECTED


def test_a_result_of_21_mb_is_behind_the_link_in_the_input(server: StandinServer, links: LinkServer) -> None:
    job_input = {"prompt": "x", "size": SIZE, "upload_url": f"{links.url}/up/1?Signature={SECRET}"}
    assert check(finished(server, job_input), "result_url") == f"{links.url}/up/1"
    assert links.uploads["/up/1"] == EXPECTED


def test_a_result_of_21_mb_is_in_the_workers_folder(server: StandinServer, folder: Path) -> None:
    job = finished(server, {"prompt": "x", "size": SIZE})
    path = Path(check(job, "result_path"))
    assert path == folder / f"{job.id}.json"
    assert path.read_bytes() == EXPECTED


@pytest.mark.parametrize("status", [400, 413])
def test_the_result_of_a_stream_that_the_platform_refuses_is_kept(server: StandinServer, status: int) -> None:
    behaviour, server.platform.behaviour = (
        server.platform.behaviour,
        Behaviour(take_hold=5, done_post_limit=1_000_000, done_refusal_status=status),
    )
    job = finished(server, {"prompt": "x", "stream": True, "events": 8, "zeros": 100_000})
    server.platform.behaviour = behaviour
    parts = json.loads(Path(job.output["result_path"]).read_bytes())
    assert [chunk["n"] for part in parts for chunk in part] == list(range(8))
    assert job.chunks == parts


def test_a_small_result_is_posted_as_it_is(server: StandinServer, links: LinkServer, s3: S3Server) -> None:
    job_input = {"prompt": "x", "size": 10, "upload_url": f"{links.url}/up/2"}
    assert finished(server, job_input, s3Config=s3.config).output == [{"text": "x" * 10}]
    assert "/up/2" not in links.uploads


def test_an_input_behind_a_link_is_fetched(server: StandinServer, links: LinkServer) -> None:
    link = links.hold("job.json", {"prompt": "x" * 20_000_000, "size": 10})
    assert finished(server, {"input_url": f"{link}?token={SECRET}"}).output == [{"text": "x" * 10}]


def test_a_job_that_is_cancelled_during_the_upload_stores_nothing(
    server: StandinServer, links: LinkServer, folder: Path
) -> None:
    before = set(folder.iterdir())
    links.arrived.clear()
    link = f"{links.url}/slow/2"
    job = server.call(server.platform.submit, {"input": {"prompt": "x", "size": SIZE, "upload_url": link}})
    assert links.arrived.wait(SECONDS)
    server.call(server.platform.cancel, job)
    server.wait_until(lambda platform: job.id in platform.records.stop_signals, SECONDS)
    finished(server, {"prompt": "x", "size": 10})
    assert (set(folder.iterdir()), links.uploads.keys() & {"/slow/2"}) == (before, set())
    assert (job.status, job.output) == (Status.CANCELLED, None)


def test_no_secret_is_in_the_log(server: StandinServer, s3: S3Server, links: LinkServer, log: Path) -> None:
    config = {**s3.config, "accessSecret": SECRET}
    job_input = {"prompt": "x", "size": SIZE, "upload_url": f"{links.url}/status/403?Signature={SECRET}"}
    with s3.locked():
        check(finished(server, job_input, s3Config=config), "result_path")
    text = log.read_text()
    assert "its result cannot be stored. upload_url" in text
    assert "its result cannot be stored. s3Config" in text
    assert SECRET not in text
    assert s3.secret not in text
