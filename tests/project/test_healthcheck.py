"""Docker's health check, which runs as its own process beside the worker."""

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

import pytest

from tests.support.ports import free_port
from tests.support.tiny import ROOT

QUEUE = {"RUNPOD_WEBHOOK_GET_JOB": "http://platform/job-take/$ID?"}


@contextmanager
def server(status: int, address: str = "127.0.0.1") -> Iterator[int]:
    """Answer every GET with a status, and 404 if it is not for `/ping` and a local host name; yield the port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            expected = self.path == "/ping" and self.headers["Host"] in ("localhost", "worker")
            self.send_response_only(status if expected else HTTPStatus.NOT_FOUND)
            self.end_headers()

    with http.server.ThreadingHTTPServer((address, 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield running.server_port
        finally:
            running.shutdown()
            thread.join()


def check(**environ: str) -> tuple[int, str]:
    """Return the exit code and the output of the health check, started in another folder."""
    command = [sys.executable, str(ROOT / "builder/healthcheck.py")]
    environ = {"PATH": os.environ["PATH"], **environ}
    done = subprocess.run(command, cwd="/", env=environ, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.strip()


@pytest.mark.parametrize(
    ("status", "code", "output"),
    [
        pytest.param(200, 0, "The worker is ready.", id="ready"),
        pytest.param(204, 1, "The worker is loading the model.", id="loading the model"),
        pytest.param(503, 1, "The worker is not healthy: status 503.", id="its start failed"),
    ],
)
def test_only_a_worker_that_is_ready_is_healthy(status: int, code: int, output: str) -> None:
    with server(status) as port:
        assert check(PORT=str(port)) == (code, output)


def test_a_worker_that_does_not_answer_is_not_healthy() -> None:
    assert check(PORT=str(free_port())) == (1, "The worker does not answer: ConnectionRefusedError")


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"PORT": "PORT"}, id="the HTTP server's port"),
        pytest.param({"WORKER_MODE": "http", "PORT": "PORT", "METRICS_PORT": "1"}, id="HTTP and a port for metrics"),
        pytest.param({"PORT": "PORT", "PORT_HEALTH": "1"}, id="HTTP and a port for health"),
        pytest.param(QUEUE | {"PORT_HEALTH": "PORT"}, id="queue with a port for health"),
        pytest.param(QUEUE | {"METRICS_PORT": "PORT"}, id="queue with a port for metrics"),
        pytest.param({"VLLM_CONFIG_FILE": "FILE"}, id="the port in the configuration file"),
        pytest.param({"PORT": "PORT", "DTYPE": "wrong", "MAX_QUEUE": "wrong"}, id="settings that are wrong"),
        pytest.param({"PORT": "PORT", "HOST": "127.0.0.1", "ALLOWED_HOSTS": "worker"}, id="other host names only"),
        pytest.param({"PORT": "PORT", "http_proxy": "http://127.0.0.1:1"}, id="a proxy for requests to the Internet"),
        pytest.param({"PORT": "PORT", "WORKER_API_KEY": "key"}, id="a key"),
    ],
)
def test_the_health_check_asks_the_port_that_is_served(settings: dict[str, str], tmp_path: Path) -> None:
    with server(200) as port:
        (file := tmp_path / "worker.yaml").write_text(f"port: {port}\n")
        environ = {
            name: value.replace("PORT", str(port)).replace("FILE", str(file)) for name, value in settings.items()
        }
        assert check(**environ) == (0, "The worker is ready.")


def test_the_health_check_asks_the_address_that_is_served() -> None:
    with server(200, "127.0.0.2") as port:
        assert check(PORT=str(port), HOST="127.0.0.2") == (0, "The worker is ready.")


@pytest.mark.parametrize("settings", [QUEUE, {"WORKER_MODE": "local"}], ids=["queue", "one local job"])
def test_a_worker_without_a_port_is_healthy(settings: dict[str, str]) -> None:
    assert check(**settings) == (0, "")
