"""Results that the platform does not accept, with a real S3 server and with servers that misbehave."""

import asyncio
import hashlib
import json
import logging
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.s3 import BUCKET, LinkServer, S3Server, s3_server
from worker.errors import Json, ResultRefusedError
from worker.media.fetch import Policy
from worker.queue.results import Bucket, Results
from worker.settings import Settings

OPEN = Policy(private_networks=True)
DATA = json.dumps([{"text": "x" * 2_000_000}]).encode()
REFUSAL = ResultRefusedError(len(DATA), 413)
SECRET = "secret-that-no-log-may-hold"
JOB_ID = "6f1c2a-u1"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def links() -> Iterator[LinkServer]:
    with LinkServer() as server:
        yield server


def store(job: Json, settings: Settings | None = None, policy: Policy = OPEN, seconds: float = 20.0) -> Json:
    """Store the result of a job, and return the output that takes its place."""
    results = Results(settings or Settings(), policy, seconds)
    return asyncio.run(results.store({"id": JOB_ID, "input": {}, **job}, DATA, REFUSAL))


def refused(job: Json, settings: Settings | None = None, policy: Policy = OPEN, seconds: float = 20.0) -> str:
    """Return the message for a job whose result cannot be kept."""
    with pytest.raises(ResultRefusedError) as raised:
        store(job, settings, policy, seconds)
    return str(raised.value)


def check_description(output: Json) -> None:
    digest = hashlib.sha256(DATA).hexdigest()
    assert output == {"bytes": len(DATA), "sha256": digest, "content_type": "application/json"}


def upload(link: str) -> Json:
    return {"input": {"prompt": "Hello", "upload_url": link}}


# ---- S3


def test_the_bucket_of_a_job_keeps_its_result_and_the_link_leads_to_it(s3: S3Server) -> None:
    with s3.locked():
        output = store({"s3Config": s3.config})
    answer = httpx.get(link := output.pop("result_url"))
    assert (answer.content, answer.headers["content-type"]) == (DATA, "application/json")
    assert link.startswith(f"{s3.url}/{BUCKET}/{JOB_ID}/")
    assert "X-Amz-Expires=604800" in link
    assert s3.secret not in link
    check_description(output)


def test_the_workers_own_bucket_may_be_in_a_private_network(s3: S3Server) -> None:
    settings = Settings(
        bucket_endpoint_url=f"{s3.url}/{BUCKET}",
        bucket_access_key_id=s3.key_id,
        bucket_secret_access_key=s3.secret,
        result_url_seconds=60,
    )
    with s3.locked():
        output = store({}, settings, Policy())
    assert httpx.get(output["result_url"]).content == DATA
    assert "X-Amz-Expires=60" in output["result_url"]


def test_a_bucket_that_is_only_partly_set_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    refused({}, Settings(bucket_endpoint_url="https://s3.example.com", bucket_access_key_id="id"))
    assert "Results are not stored in a bucket, because BUCKET_SECRET_ACCESS_KEY is not set" in caplog.text
    caplog.clear()
    refused({})
    assert "bucket" not in caplog.text


def test_two_results_of_one_job_have_different_names(s3: S3Server) -> None:
    links = {store({"s3Config": s3.config})["result_url"].partition("?")[0] for _ in range(2)}
    assert len(links) == 2


@pytest.mark.parametrize(
    ("change", "status"),
    [
        pytest.param({"accessSecret": SECRET}, 403, id="a wrong secret"),
        pytest.param({"accessId": "AKIANOBODY"}, 403, id="an unknown access key"),
        pytest.param({"bucketName": "nowhere"}, 404, id="no such bucket"),
    ],
)
def test_a_bucket_that_refuses_the_result_is_named_with_its_status(
    s3: S3Server, change: Json, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    before = s3.keys()
    with s3.locked():
        message = refused({"s3Config": {**s3.config, **change}})
    assert f"s3Config: the link's server answered with HTTP status {status}." in message
    assert s3.keys() == before
    for secret in (SECRET, s3.secret, "AKIANOBODY"):
        assert secret not in caplog.text + message


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        pytest.param("text", "it needs the strings", id="no object"),
        pytest.param({}, "it needs the strings", id="empty"),
        pytest.param({"endpointUrl": 1}, "it needs the strings", id="a number"),
        pytest.param({"endpointUrl": "http://[x/"}, "the endpoint is not a valid", id="broken URL"),
        pytest.param({"endpointUrl": "http://x:y/"}, "the endpoint is not a valid", id="no port"),
        pytest.param({"endpointUrl": "http://:80/"}, "the endpoint is not a valid", id="no host"),
        pytest.param({"endpointUrl": "s3.example.com"}, "the endpoint is not a valid", id="no scheme"),
        pytest.param({"endpointUrl": "file:///etc"}, "the endpoint is not a valid", id="a file"),
        pytest.param({"endpointUrl": f"https://a:{SECRET}@example.com"}, "must not contain a user", id="password"),
        pytest.param({"accessSecret": "\ud800"}, "characters that no key has", id="half a surrogate pair"),
        pytest.param({"accessId": "a\r\nx: y"}, "characters that no key has", id="line break"),
    ],
)
def test_a_wrong_s3_config_is_explained(
    s3: S3Server, config: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = {**s3.config, **config} if isinstance(config, dict) and config else config
    message = refused({"s3Config": whole})
    assert reason in message
    assert SECRET not in caplog.text + message


@pytest.mark.parametrize(
    ("endpoint", "name", "bucket", "region"),
    [
        ("https://s3.eu-west-1.amazonaws.com", "b", "https://s3.eu-west-1.amazonaws.com/b", "eu-west-1"),
        ("https://s3.amazonaws.com", "b", "https://s3.amazonaws.com/b", "us-east-1"),
        ("https://s3api-eu-ro-1.runpod.io/", "v1", "https://s3api-eu-ro-1.runpod.io/v1", "eu-ro-1"),
        ("https://s3.us-west-004.backblazeb2.com/b", "", "https://s3.us-west-004.backblazeb2.com/b", "us-west-004"),
        ("https://x.supabase.co/storage/v1/s3", "b", "https://x.supabase.co/storage/v1/s3/b", "us-east-1"),
        ("https://b.nyc3.digitaloceanspaces.com", "", "https://b.nyc3.digitaloceanspaces.com/MONTH", "us-east-1"),
        ("http://localhost:9000", "a/../b?", "http://localhost:9000/a%2F..%2Fb%3F", "us-east-1"),
    ],
)
def test_the_bucket_and_its_region(endpoint: str, name: str, bucket: str, region: str) -> None:
    config = {"endpointUrl": endpoint, "accessId": "id", "accessSecret": "secret", "bucketName": name}
    expected = bucket.replace("MONTH", time.strftime("%m-%y"))
    assert Bucket("s3Config", config, 60, OPEN)._read() == (expected, region, "id", "secret")


# ---- Presigned links


def test_a_presigned_link_gets_the_result_and_is_returned_without_its_query(links: LinkServer) -> None:
    output = store(upload(f"{links.url}/up/1?Signature={SECRET}#part"))
    assert output.pop("result_url") == f"{links.url}/up/1"
    assert links.uploads["/up/1"] == DATA
    check_description(output)


def test_a_link_that_boto3_presigns_by_default_works(s3: S3Server) -> None:
    """Its signature of the second version covers the content type. moto does not check it; `typeless` below does."""
    link = s3.client.generate_presigned_url("put_object", {"Bucket": BUCKET, "Key": "mine.json"})
    assert store(upload(link))["result_url"] == f"{s3.url}/{BUCKET}/mine.json"
    assert s3.content_type("mine.json") == "application/json"


@pytest.mark.parametrize(
    ("path", "requests"),
    [
        pytest.param("/typeless/1", ["/typeless/1"] * 2, id="signed without a content type"),
        pytest.param("/flaky/3", ["/flaky/3"] * 3, id="fails twice"),
        pytest.param("/reset/4", ["/reset/4"] * 4, id="loses the connection"),
        pytest.param("/redirect/307/up/1", ["/redirect/307/up/1", "/up/1"], id="redirected"),
    ],
)
def test_an_upload_is_repeated_where_that_helps(links: LinkServer, path: str, requests: list[str]) -> None:
    store(upload(links.url + path))
    assert links.requests == [f"PUT {request}" for request in requests]
    assert links.uploads[requests[-1]] == DATA


@pytest.mark.parametrize(
    ("path", "reason", "count"),
    [
        pytest.param("/status/403", "the link's server answered with HTTP status 403", 2, id="refused"),
        pytest.param("/status/500", "the link's server answered with HTTP status 500", 3, id="always fails"),
        pytest.param("/redirect/302/up", "the link's server answered with HTTP status 302", 2, id="302 is for GET"),
        pytest.param("/redirect/307/redirect/307/redirect/307/redirect/307/up", "more than 3 times", 4, id="loop"),
        pytest.param("/reset/", "the link's server cannot be reached", 6, id="closes connections"),
    ],
)
def test_an_upload_that_fails_is_named_with_the_reason(
    links: LinkServer, path: str, reason: str, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    """aiohttp itself sends a request again whose connection breaks."""
    message = refused(upload(f"{links.url}{path}?Signature={SECRET}"))
    assert reason in message
    assert message.startswith("RunPod does not accept 2.0 MB of output (HTTP 413). It could not be stored elsewhere. ")
    assert len(links.requests) == count
    assert not links.uploads
    assert f"Job {JOB_ID}: its result cannot be stored. upload_url: " in caplog.text
    assert SECRET not in caplog.text + message


def test_a_slow_server_is_given_up(links: LinkServer) -> None:
    began = time.monotonic()
    assert "upload_url: it took longer than 0.5 s." in refused(upload(f"{links.url}/slow/30"), seconds=0.5)
    assert time.monotonic() - began < 10


# ---- Addresses


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "10.0.0.1", "169.254.169.254", "[::1]", "127.1"])
@pytest.mark.parametrize("kind", ["upload_url", "s3Config"])
def test_callers_cannot_send_results_into_the_private_network(links: LinkServer, kind: str, host: str) -> None:
    policy = Policy(ports=(links.server_port,))
    endpoint = f"http://{host}:{links.server_port}"
    config = {"endpointUrl": endpoint, "accessId": "id", "accessSecret": "secret", "bucketName": "b"}
    job = upload(f"{endpoint}/up/1") if kind == "upload_url" else {"s3Config": config}
    assert f"{kind}: the link does not lead to a public address." in refused(job, policy=policy)
    assert not links.requests


# ---- The worker's folder


def test_the_folder_keeps_a_result_under_the_jobs_id(tmp_path: Path) -> None:
    output = store({}, Settings(result_folder=str(tmp_path / "results")))
    assert output.pop("result_path") == str(path := tmp_path / "results" / f"{JOB_ID}.json")
    assert path.read_bytes() == DATA
    assert list(path.parent.iterdir()) == [path]
    check_description(output)


@pytest.mark.parametrize("job_id", ["../../etc/passwd", "a/b", "..", "", ".hidden", "x" * 500, "日本"])
def test_an_unusual_job_id_stays_in_the_folder(tmp_path: Path, job_id: str) -> None:
    path = Path(store({"id": job_id}, Settings(result_folder=str(tmp_path)))["result_path"])
    assert path.parent == tmp_path
    assert list(tmp_path.iterdir()) == [path]


def test_different_unusual_ids_have_different_files(tmp_path: Path) -> None:
    settings = Settings(result_folder=str(tmp_path))
    assert len({store({"id": job_id}, settings)["result_path"] for job_id in ("a/b", "a_b", "a.b")}) == 3


def test_a_folder_that_is_a_file_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = refused({}, Settings(result_folder=str(tmp_path / "file")))
    assert "RESULT_FOLDER: the file cannot be written (File exists)." in message
    assert str(tmp_path) not in message


def test_nothing_is_left_of_a_file_that_cannot_be_completed(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        message = refused({}, Settings(result_folder=str(tmp_path)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "RESULT_FOLDER: the file cannot be written (File too large)." in message
    assert not list(tmp_path.iterdir())


# ---- Their order


def test_each_store_is_tried_once_the_ones_before_have_failed(
    s3: S3Server, links: LinkServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(
        bucket_endpoint_url=links.url,
        bucket_access_key_id="id",
        bucket_secret_access_key=SECRET,
        bucket_name="reset",
        result_folder=str(tmp_path),
    )
    job = {**upload(f"{links.url}/status/403"), "s3Config": {**s3.config, "bucketName": "nowhere"}}
    with caplog.at_level(logging.INFO):
        assert store(job, settings)["result_path"]
    stored = [record.getMessage() for record in caplog.records if record.name == "worker.queue.results"]
    assert [line.removeprefix(f"Job {JOB_ID}: its result ").partition(": ")[0] for line in stored] == [
        "cannot be stored. upload_url",
        "cannot be stored. s3Config",
        "cannot be stored. BUCKET_ENDPOINT_URL",
        "of 2.0 MB is stored (RESULT_FOLDER)",
    ]
    assert SECRET not in caplog.text


def test_the_first_store_that_works_is_the_only_one(s3: S3Server, links: LinkServer, tmp_path: Path) -> None:
    before = s3.keys()
    store({**upload(f"{links.url}/up/1"), "s3Config": s3.config}, Settings(result_folder=str(tmp_path)))
    assert (s3.keys(), list(tmp_path.iterdir())) == (before, [])


def test_without_a_store_the_error_says_what_to_send_or_set() -> None:
    assert refused({}) == (
        "RunPod does not accept 2.0 MB of output (HTTP 413). A result may have at most 20 MB. Ask for fewer tokens or "
        "log probabilities. To get larger results as links, send 'upload_url' in the job's input or 's3Config' beside "
        "it, or set BUCKET_ENDPOINT_URL or RESULT_FOLDER."
    )


# ---- Cancelled jobs


def test_a_job_that_is_cancelled_during_the_upload_stores_nothing(links: LinkServer, tmp_path: Path) -> None:
    results = Results(Settings(result_folder=str(tmp_path)), OPEN)

    async def run() -> None:
        keeping = asyncio.create_task(results.store({"id": JOB_ID, **upload(f"{links.url}/slow/1")}, DATA, REFUSAL))
        await asyncio.to_thread(links.arrived.wait)
        keeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await keeping

    asyncio.run(run())
    assert not list(tmp_path.iterdir())
    assert not links.uploads


def test_a_job_that_is_cancelled_while_its_file_is_written_leaves_no_file(tmp_path: Path) -> None:
    def wait_for_the_file() -> None:
        while not list(tmp_path.iterdir()):
            time.sleep(0.001)

    async def run() -> None:
        keeping = asyncio.create_task(
            Results(Settings(result_folder=str(tmp_path)), OPEN).store({"id": JOB_ID}, DATA * 50, REFUSAL)
        )
        await asyncio.to_thread(wait_for_the_file)
        keeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await keeping

    asyncio.run(run())
    # The thread ends soon after the job.
    deadline = time.monotonic() + 10
    while (left := [path.name for path in tmp_path.iterdir()]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left


def test_the_s3_library_is_imported_only_for_a_bucket(tmp_path: Path) -> None:
    code = (
        "import asyncio, sys; from worker.errors import ResultRefusedError; "
        "from worker.media.fetch import Policy; from worker.queue.results import Results; "
        "from worker.settings import Settings; "
        f"results = Results(Settings(result_folder={str(tmp_path)!r}), Policy()); "
        "asyncio.run(results.store({'id': 'a'}, b'x', ResultRefusedError(1))); "
        "assert not {'boto3', 'botocore'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
