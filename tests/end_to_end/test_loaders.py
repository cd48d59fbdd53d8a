"""A loader of weights that the worker has chosen and that fails: the engine starts with vLLM's own loader."""

import sys
from collections.abc import Iterator

import httpx
import pytest

from tests.conftest import Endpoint, engine_processes, run_endpoint
from tests.support.ports import free_port

PACKAGE = {
    "__init__.py": "class SingleGroup:\n    def size(self):\n        return 1\n",
    "parallel_loader.py": (
        "class ParallelLoader:\n    def __init__(self, **_options):\n        raise RuntimeError('no such disk')\n"
    ),
}
"""A stand-in for the package `fastsafetensors`, as far as vLLM uses it."""


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A queue worker that has chosen a loader that fails."""
    folder = tmp_path_factory.mktemp("failing-loader")
    package = folder / "packages/fastsafetensors"
    package.mkdir(parents=True)
    for name, source in PACKAGE.items():
        (package / name).write_text(source)
    command = [sys.executable, "-m", "tests.support.failing_loader"]
    settings = {"PYTHONPATH": str(package.parent), "METRICS_PORT": str(free_port())}
    with run_endpoint(folder, command, **settings) as running:
        yield running


def test_a_worker_whose_loader_fails_answers_with_vllms_own(endpoint: Endpoint) -> None:
    body = {"input": {"prompt": "Hello", "max_tokens": 3}}
    answer = httpx.post(f"{endpoint.url}/runsync", json=body, timeout=60).json()
    assert answer["status"] == "COMPLETED"
    assert answer["output"][0]["usage"]["completion_tokens"] == 3


def test_one_line_of_the_worker_says_that_it_starts_again(endpoint: Endpoint) -> None:
    lines = [line for line in endpoint.log.read_text().splitlines() if '"logger": "worker.engine.loaders"' in line]
    assert len(lines) == 1, lines
    assert "The engine did not start with fastsafetensors (" in lines[0]


def test_the_log_and_info_say_which_loader_was_used_and_why(endpoint: Endpoint) -> None:
    info = httpx.get(f"http://127.0.0.1:{endpoint.metrics_port}/info", timeout=10).json()
    assert info["engine"]["load_format"] == "auto (fastsafetensors failed)"
    assert '"load_format": "auto (fastsafetensors failed)"' in endpoint.log.read_text()


def test_the_processes_of_the_first_start_have_ended(endpoint: Endpoint) -> None:
    assert len(engine_processes(endpoint.worker)) == 1
