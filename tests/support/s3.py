"""A real S3 server, and a server for presigned links that misbehaves."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

import httpx

from tests.support.local_server import LocalServer

BUCKET = "results"
ALLOW_ALL = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}


@dataclass(frozen=True)
class S3Server:
    """An S3 server with one bucket and one user, who may do everything."""

    url: str
    key_id: str
    secret: str
    client: Any = field(repr=False)

    @property
    def config(self) -> dict[str, str]:
        """The server as RunPod's `s3Config`."""
        return {"endpointUrl": self.url, "accessId": self.key_id, "accessSecret": self.secret, "bucketName": BUCKET}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Check the signature of every request within the block."""
        self._check_from(0)
        try:
            yield
        finally:
            self._check_from(1_000_000)

    def _check_from(self, request: int) -> None:
        httpx.post(f"{self.url}/moto-api/reset-auth", content=str(request)).raise_for_status()

    def keys(self) -> list[str]:
        """Return the names of all objects."""
        return [item["Key"] for item in self.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])]

    def content_type(self, key: str) -> str:
        return str(self.client.head_object(Bucket=BUCKET, Key=key)["ContentType"])


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run an S3 server in a thread. All servers of one process have the same content: run one at a time."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        httpx.post(f"{url}/moto-api/reset").raise_for_status()
        session = boto3.session.Session("setup", "setup", region_name="us-east-1")
        iam = session.client("iam", endpoint_url=url)
        iam.create_user(UserName="worker")
        iam.put_user_policy(UserName="worker", PolicyName="all", PolicyDocument=json.dumps(ALLOW_ALL))
        key = iam.create_access_key(UserName="worker")["AccessKey"]
        client = session.client("s3", endpoint_url=url)
        client.create_bucket(Bucket=BUCKET)
        yield S3Server(url, key["AccessKeyId"], key["SecretAccessKey"], client)
    finally:
        server.stop()


class LinkServer(LocalServer):
    """Takes uploads, and returns them. `uploads` has the bodies by path, `requests` every request in order."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.uploads: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.arrived = threading.Event()
        """Set when a request has arrived."""
        self.answered = threading.Event()
        """Set when an answer was sent."""

    def hold(self, name: str, value: Any) -> str:
        """Return a link to a value as JSON, or to bytes as they are."""
        path = f"/held/{name}"
        self.uploads[path] = value if isinstance(value, bytes) else json.dumps(value).encode()
        return self.url + path


class _Handler(BaseHTTPRequestHandler):
    """The first segment of the path, such as `/slow/5`, selects the behaviour and the rest is its argument.

    A GET request of `/late/2/held/name` is answered two seconds later.
    """

    server: LinkServer

    def do_GET(self) -> None:
        server, path = self.server, self.path.partition("?")[0]
        server.requests.append(f"GET {path}")
        server.arrived.set()
        if path.startswith("/late/"):
            _, _, seconds, path = path.split("/", 3)
            time.sleep(float(seconds))
            path = f"/{path}"
        body = server.uploads.get(path)
        self._answer(404 if body is None else 200, body or b"")

    def do_PUT(self) -> None:
        server, path = self.server, self.path.partition("?")[0]
        server.requests.append(f"PUT {path}")
        server.arrived.set()
        behaviour, _, argument = path[1:].partition("/")
        attempts = server.requests.count(f"PUT {path}")
        if behaviour == "reset" and not (argument.isdigit() and attempts >= int(argument)):
            self.connection.close()
            return
        if behaviour == "slow":
            time.sleep(float(argument))
        body = self.rfile.read(length := int(self.headers["content-length"]))
        if len(body) < length:
            return
        match behaviour:
            case "status":
                self._answer(int(argument))
            case "redirect":
                status, _, target = argument.partition("/")
                self._answer(int(status), location=f"/{target}")
            case "flaky" if attempts < int(argument):
                self._answer(503)
            case "typeless" if "content-type" in self.headers:
                self._answer(403)
            case _:
                server.uploads[path] = body
                self._answer(200)

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"content-length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.server.answered.set()

    def log_message(self, *args: object) -> None:
        """Do not log."""

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError):
            """The connection is closed."""
