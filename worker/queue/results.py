"""Keeps results that the platform does not accept, and returns where they are.

A result is kept by the first of these that works: the link `upload_url` in the job's input, the S3 bucket in the job's
`s3Config`, the worker's own bucket, and the worker's own folder.
"""

import asyncio
import hashlib
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from worker import threads
from worker.errors import Json, MediaError, ResultRefusedError
from worker.media.fetch import Policy
from worker.media.upload import upload, upload_presigned
from worker.queue.handler import UPLOAD_URL, Job
from worker.settings import Settings

CONTENT_TYPE = "application/json"
STORE_SECONDS = 120.0
"""The limit for one store, with all attempts."""
FOLDER_THREADS = 2
"""How many results are written to the folder at once."""
S3_FIELDS = ("endpointUrl", "accessId", "accessSecret", "bucketName")
"""The fields of RunPod's `s3Config`. The name may be missing."""
_REGION = re.compile(r"(?:^|\.)s3(?:api)?[.-]([a-z]+-[a-z0-9-]+)\.")
"""The region in the host names of AWS, RunPod, Backblaze and others. Elsewhere its name does not matter."""
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")

log = logging.getLogger(__name__)


class Store(Protocol):
    """One place for results."""

    @property
    def name(self) -> str:
        """The field or the setting that defines it."""

    async def put(self, job_id: str, data: bytes) -> Json:
        """Keep a job's result, and return `result_url` or `result_path`.

        Raises:
            MediaError, StoreError: this is not possible. The message has no secrets.
        """


class StoreError(Exception):
    """A store does not work. The message is the reason."""


class Results:
    """The stores of all jobs.

    `policy` says which links of callers may be used, and `seconds` how long one store may take.
    """

    def __init__(self, settings: Settings, policy: Policy, seconds: float = STORE_SECONDS) -> None:
        self._settings = settings
        self._own_bucket = _own_bucket(settings)
        self._policy = policy
        self._seconds = seconds
        # A volume that hangs must not keep threads from others.
        self._threads = ThreadPoolExecutor(FOLDER_THREADS, "results")
        # The operator chooses the worker's own bucket, so it may be in a private network.
        self._trusted = Policy(private_networks=True)

    async def store(self, job: Job, data: bytes, refusal: ResultRefusedError) -> Json:
        """Store a result that the platform has refused, and return the output that takes its place.

        Raises:
            ResultRefusedError: no store works; the message says why, and what to set.
        """
        failures = []
        digest = await asyncio.to_thread(hashlib.sha256, data)
        for store in self._stores(job):
            try:
                async with asyncio.timeout(self._seconds):
                    place = await store.put(job["id"], data)
            except TimeoutError:
                reason = f"it took longer than {self._seconds:g} s"
            except (MediaError, StoreError) as error:
                reason = str(error)
            else:
                log.info("Job %s: its result of %.1f MB is stored (%s)", job["id"], len(data) / 1e6, store.name)
                return {**place, "bytes": len(data), "sha256": digest.hexdigest(), "content_type": CONTENT_TYPE}
            log.warning("Job %s: its result cannot be stored. %s: %s", job["id"], store.name, reason)
            failures.append(f"{store.name}: {reason}.")
        raise ResultRefusedError(refusal.size, refusal.answer, failures)

    def _stores(self, job: Job) -> Iterator[Store]:
        """Yield the stores for a job's result, in the order in which they are tried."""
        settings, job_input = self._settings, job.get("input")
        if isinstance(job_input, dict) and (link := job_input.get(UPLOAD_URL)):
            yield UploadLink(link, self._policy)
        if (config := job.get("s3Config")) is not None:
            yield Bucket("s3Config", config, settings.result_url_seconds, self._policy)
        if self._own_bucket is not None:
            yield Bucket("BUCKET_ENDPOINT_URL", self._own_bucket, settings.result_url_seconds, self._trusted)
        if settings.result_folder is not None:
            yield Folder(Path(settings.result_folder), self._threads)


def _own_bucket(settings: Settings) -> Json | None:
    """Return the worker's own bucket in the form of `s3Config`, or None if it is not set."""
    own = {
        "BUCKET_ENDPOINT_URL": settings.bucket_endpoint_url,
        "BUCKET_ACCESS_KEY_ID": settings.bucket_access_key_id,
        "BUCKET_SECRET_ACCESS_KEY": settings.bucket_secret_access_key,
    }
    if missing := [name for name, value in own.items() if not value]:
        if len(missing) < len(own):
            log.warning("Results are not stored in a bucket, because %s is not set", " and ".join(missing))
        return None
    return dict(zip(S3_FIELDS, (*own.values(), settings.bucket_name), strict=True))


@dataclass(frozen=True, slots=True)
class UploadLink:
    """A link for the method PUT, which the caller has presigned."""

    link: str
    policy: Policy
    name: str = UPLOAD_URL

    async def put(self, job_id: str, data: bytes) -> Json:
        """See `Store`."""
        del job_id
        return {"result_url": await upload_presigned(self.policy, self.link, data, CONTENT_TYPE)}


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket on an S3 server. `config` has the fields of RunPod's `s3Config`.

    botocore only signs the requests. The worker's own client sends them, so that a caller's endpoint is under the same
    policy as all links, and an upload ends when its job is cancelled.
    """

    name: str
    config: Any
    seconds: int
    """How long the link to a result is valid."""
    policy: Policy

    async def put(self, job_id: str, data: bytes) -> Json:
        """See `Store`."""
        bucket, region, key_id, secret = self._read()
        url = f"{bucket}/{_file_name(job_id)}/{uuid.uuid4().hex}.json"
        headers, link = await asyncio.to_thread(_sign, url, data, key_id, secret, region, self.seconds)
        # A signature is valid for one host.
        await upload(self.policy, url, data, headers, redirects=())
        return {"result_url": link}

    def _read(self) -> tuple[str, str, str, str]:
        """Return the bucket's URL, its region, the access key and the key's secret.

        Without a name, the bucket is the first part of the endpoint's path. If there is none either, it is the month,
        as for RunPod's SDK: its endpoints have the bucket in the host name.
        """
        config = self.config if isinstance(self.config, dict) else {}
        *texts, name = (config.get(field) or "" for field in S3_FIELDS)
        if not all(texts) or not all(isinstance(text, str) for text in (*texts, name)):
            raise StoreError(f"it needs the strings {', '.join(S3_FIELDS)}")
        endpoint, key_id, secret = map(str, texts)
        if not all(text.isascii() and text.isprintable() and " " not in text for text in (key_id, secret)):
            raise StoreError("the access key or its secret has characters that no key has, such as a line break")
        try:
            parts = urlsplit(endpoint)
            is_valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            is_valid = False
        if not is_valid:
            raise StoreError("the endpoint is not a valid https: or http: URL")
        folder = parts.path.rstrip("/") if name else ""
        name = name or parts.path.strip("/").partition("/")[0] or time.strftime("%m-%y")
        region = match[1] if (match := _REGION.search(parts.netloc)) else "us-east-1"
        return f"{parts.scheme}://{parts.netloc}{folder}/{quote(name, safe='')}", region, key_id, secret


def _sign(url: str, data: bytes, key_id: str, secret: str, region: str, seconds: int) -> tuple[dict[str, str], str]:
    """Return the headers for the upload of an object, and a link to it. Imports botocore: use a thread."""
    from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    credentials = Credentials(key_id, secret)
    upload = AWSRequest("PUT", url, {"Content-Type": CONTENT_TYPE}, data)
    S3SigV4Auth(credentials, "s3", region).add_auth(upload)
    download = AWSRequest("GET", url)
    S3SigV4QueryAuth(credentials, "s3", region, expires=seconds).add_auth(download)
    return dict(upload.headers), download.url


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder, for example on the network volume."""

    folder: Path
    executor: Executor
    name: str = "RESULT_FOLDER"

    async def put(self, job_id: str, data: bytes) -> Json:
        """See `Store`. The file appears when it is complete, and not at all if the job is cancelled before."""
        path, cancelled = self.folder / f"{_file_name(job_id)}.json", threading.Event()
        try:
            await threads.call(self.executor, _write, path, data, cancelled)
        except OSError as error:
            raise StoreError(f"the file cannot be written ({error.strerror})") from None
        finally:
            cancelled.set()
        return {"result_path": str(path)}


def _write(path: Path, data: bytes, cancelled: threading.Event) -> None:
    """Write a file under another name first, and give it its name unless the job is cancelled meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if not cancelled.is_set():
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _file_name(job_id: str) -> str:
    """Return a job's id as a file name."""
    name = _UNSAFE.sub("_", job_id)[:100]
    return name if name == job_id else f"{name}-{hashlib.sha256(job_id.encode()).hexdigest()[:16]}"
