"""The servers that are compared, each with an engine of its own and the same model and settings."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

from tests.support import tiny
from tests.support.ports import free_port
from tests.support.tiny import ROOT

MODEL_PROCESSES = ("VLLM::EngineCore", "VLLM::Worker")
SDK_LOOP = ("-m", "bench.sdk_loop")
"""The worker under the SDK's own job loop."""
START_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Server:
    """A running server; `front` are its processes but for the model's and the platform's."""

    name: str
    base_url: str
    front: list[psutil.Process]

    @property
    def endpoint_url(self) -> str:
        """Where the platform's stand-in takes jobs."""
        return self.base_url.removesuffix("/openai/v1")

    def cpu_seconds(self) -> float:
        """Return the CPU time that the front has used so far."""
        return sum(sum(process.cpu_times()[:2]) for process in self.front)

    def memory_mb(self) -> float:
        """Return the memory of the front; what a forked process shares with its parent counts once."""
        return sum(process.memory_full_info().pss for process in self.front) / 1e6

    def posts(self) -> int:
        """Return how many results its platform has been sent; 0 where there is no platform."""
        if "/v2/" not in self.base_url:
            return 0
        records = requests.get(f"{self.endpoint_url}/records", timeout=10).json()
        return int(records["stream_posts"] + records["done_posts"])


@contextmanager
def vllm_serve(log: Path) -> Iterator[Server]:
    """Run vLLM's own server."""
    port = free_port()
    environ = tiny.environment()
    flags = ["--port", str(port), "--disable-uvicorn-access-log", *vllm_flags(environ)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags]
    with _process(command, environ, log) as process:
        base_url = f"http://127.0.0.1:{port}/v1"
        _wait(process, f"{base_url}/models", log)
        yield Server("vllm serve", base_url, _front(process, []))


def vllm_flags(environ: dict[str, str]) -> list[str]:
    """Return what the worker's settings are on vLLM's own command line; what is left are variables of libraries."""
    model = Path(environ.pop("MODEL_NAME"))
    # As the worker has it, for answers that tell of it.
    flags = ["--model", str(model.resolve() if model.exists() else model)]
    for name in [name for name in environ if not name.startswith(("VLLM_", "HF_", "OMP_"))]:
        value = environ.pop(name)
        flags += [f"--{name.lower().replace('_', '-')}", *([] if value == "true" else [value])]
    return flags


@contextmanager
def worker(name: str, log: Path, program: tuple[str, ...] = ("handler.py",), **environ: str) -> Iterator[Server]:
    """Run the worker behind the platform's stand-in, as RunPod's queue does."""
    port = free_port()
    command = [sys.executable, "-m", "standin", "--port", str(port), "--", sys.executable, *program]
    with _process(command, tiny.environment() | environ, log) as process:
        base_url = f"http://127.0.0.1:{port}/v2/local/openai/v1"
        _wait(process, f"{base_url}/models", log)
        yield Server(name, base_url, _front(process, [process]))


@contextmanager
def http_worker(log: Path) -> Iterator[Server]:
    """Run the worker in HTTP mode."""
    port = free_port()
    environ = tiny.environment() | {"PORT": str(port)}
    with _process([sys.executable, "handler.py"], environ, log) as process:
        base_url = f"http://127.0.0.1:{port}/v1"
        _wait(process, f"{base_url}/models", log)
        yield Server("http", base_url, _front(process, []))


def _front(process: psutil.Process, platform: list[psutil.Process]) -> list[psutil.Process]:
    """Return the server's processes that neither run the model nor are helpers that never run."""
    family = [process, *process.children(recursive=True)]
    return [one for one in family if one not in platform and not _runs_model(one)]


def _runs_model(process: psutil.Process) -> bool:
    return any(part in " ".join(process.cmdline()) for part in MODEL_PROCESSES)


@contextmanager
def _process(command: list[str], environ: dict[str, str], log: Path) -> Iterator[psutil.Popen]:
    with log.open("wb") as output:
        process = psutil.Popen(
            command, env={**os.environ, **environ}, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            family = [*process.children(recursive=True), process]
            process.terminate()
            _, alive = psutil.wait_procs(family, timeout=15)
            for one in alive:
                one.kill()
            psutil.wait_procs(alive, timeout=15)


def _wait(process: psutil.Popen, url: str, log: Path) -> None:
    for _ in range(START_SECONDS):
        if process.poll() is not None:
            raise RuntimeError(f"it ended with {process.returncode}:\n{log.read_text()[-3000:]}")
        try:
            if requests.get(url, timeout=60).status_code == 200:
                return
        except requests.RequestException:
            pass
        time.sleep(1)
    raise RuntimeError(f"it was not ready after {START_SECONDS} s:\n{log.read_text()[-3000:]}")
