"""A worker whose requests name LoRA adapters, and a client for both ways."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from tests.conftest import API_KEY, Endpoint, HttpWorker, OneAtATime, both_ways, run_endpoint
from tests.model.hub import Hub, handler_for
from tests.support import adapters
from tests.support.ports import free_port


@dataclass(frozen=True)
class AdapterWorker:
    """A worker for jobs of an endpoint and for requests over HTTP, its adapter folder and the stand-in for the Hub."""

    endpoint: Endpoint
    url: str
    folder: Path
    hub: Hub

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {API_KEY}"}, timeout=60)


@contextmanager
def run_adapter_worker(root: Path) -> Iterator[AdapterWorker]:
    """Run a worker that keeps two adapters. Those in LORA_MODULES are the same that requests load."""
    hub, port = Hub(), free_port()
    for name in ("french", "upper"):
        adapters.write(root / "folder" / name, adapters.files_of(name))
        hub.repositories[f"my-org/{name}"] = adapters.files_of(name)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler_for(hub)) as server:
        hub.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        settings = {
            "LORA_ALLOW": ",".join(["my-org/*", "french", "upper", "changing", "missing", *adapters.wrong()]),
            "LORA_MODULES": f"static-french={adapters.FOLDER}/french,static-upper={adapters.FOLDER}/upper",
            "ADAPTER_FOLDER": str(root / "folder"),
            "MAX_CPU_LORAS": "2",
            "MAX_LORA_RANK": adapters.RANK,
            "WORKER_API_KEY": API_KEY,
            "MEDIA_ALLOW_PRIVATE_NETWORKS": "true",
            "HF_HOME": str(root / "home"),
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.port}",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        with run_endpoint(root, both_ways(port), **settings) as endpoint:
            yield AdapterWorker(endpoint, f"http://127.0.0.1:{port}", root / "folder", hub)
        server.shutdown()


@pytest.fixture(scope="module")
def adapter_worker(other_workers: OneAtATime) -> AdapterWorker:
    """A worker whose requests name LoRA adapters."""
    return other_workers.get("adapters", run_adapter_worker)


@pytest.fixture(scope="module", params=["queue", "http"])
def api(request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    """A client of the worker's routes, through the queue and over HTTP."""
    if request.param == "queue":
        endpoint: Endpoint = request.getfixturevalue("endpoint")
        # RunPod's proxy only offers routes under /v1.
        with httpx.Client(base_url=f"{endpoint.url}/openai", timeout=60) as client:
            yield client
    else:
        worker: HttpWorker = request.getfixturevalue("http_worker")
        with worker.client() as client:
            yield client
