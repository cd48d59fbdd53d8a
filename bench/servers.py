"""The servers that the benchmarks compare. Each has its own engine, with the same model and settings."""

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
"""Arguments for Python that run the worker with the SDK's own job loop."""
START_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Server:
    """A running server. `processes` excludes those of the model and of RunPod's stand-in."""

    name: str
    base_url: str
    processes: list[psutil.Process]

    @property
    def endpoint_url(self) -> str:
        """The URL of the endpoint at RunPod's stand-in."""
        return self.base_url.removesuffix("/openai/v1")

    def cpu_seconds(self) -> float:
        """Return the CPU time that the processes have used so far."""
        return sum(sum(process.cpu_times()[:2]) for process in self.processes)

    def memory_mb(self) -> float:
        """Return the memory of the processes. Memory that they share counts once."""
        return sum(process.memory_full_info().pss for process in self.processes) / 1e6

    def posts(self) -> int:
        """Return the number of results that RunPod's stand-in has received, or 0 for a server without one."""
        if "/v2/" not in self.base_url:
            return 0
        records = requests.get(f"{self.endpoint_url}/records", timeout=10).json()
        return int(records["stream_posts"] + records["done_posts"])


@contextmanager
def vllm_serve(log: Path, **environment: str) -> Iterator[Server]:
    """Run vLLM's own server, by default with the embedded model."""
    port = free_port()
    environ = tiny.environment() | environment
    flags = ["--port", str(port), "--disable-uvicorn-access-log", *vllm_flags(environ)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags]
    with _process(command, environ, log) as process:
        base_url = f"http://127.0.0.1:{port}/v1"
        _wait(process, f"{base_url}/models", log)
        yield Server("vllm serve", base_url, _server_processes(process))


def vllm_flags(environ: dict[str, str]) -> list[str]:
    """Move the worker's settings from `environ` to flags of vLLM's command line. Variables of libraries stay."""
    model = Path(environ.pop("MODEL_NAME"))
    # The worker resolves the path too, and some responses contain it.
    flags = ["--model", str(model.resolve() if model.exists() else model)]
    for name in [name for name in environ if not name.startswith(("VLLM_", "HF_", "OMP_"))]:
        value = environ.pop(name)
        flags += [f"--{name.lower().replace('_', '-')}", *([] if value == "true" else [value])]
    return flags


@contextmanager
def worker(name: str, log: Path, program: tuple[str, ...] = ("handler.py",), **environ: str) -> Iterator[Server]:
    """Run the worker with jobs from a stand-in for RunPod's queue."""
    port = free_port()
    command = [sys.executable, "-m", "standin", "--port", str(port), "--", sys.executable, *program]
    with _process(command, tiny.environment() | environ, log) as process:
        base_url = f"http://127.0.0.1:{port}/v2/local/openai/v1"
        _wait(process, f"{base_url}/models", log)
        # The first process is the stand-in.
        yield Server(name, base_url, _server_processes(process)[1:])


@contextmanager
def http_worker(log: Path, **environment: str) -> Iterator[Server]:
    """Run the worker in HTTP mode."""
    port = free_port()
    environ = tiny.environment() | {"PORT": str(port), **environment}
    with _process([sys.executable, "handler.py"], environ, log) as process:
        base_url = f"http://127.0.0.1:{port}/v1"
        _wait(process, f"{base_url}/models", log)
        yield Server("http", base_url, _server_processes(process))


def _server_processes(process: psutil.Process) -> list[psutil.Process]:
    """Return a process and all its descendants, without those that run the model."""
    return [process, *(child for child in process.children(recursive=True) if not _runs_model(child))]


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
            processes = [*process.children(recursive=True), process]
            process.terminate()
            _, alive = psutil.wait_procs(processes, timeout=15)
            for remaining in alive:
                remaining.kill()
            psutil.wait_procs(alive, timeout=15)


def _wait(process: psutil.Popen, url: str, log: Path) -> None:
    """Wait until `url` answers 200."""
    for _ in range(START_SECONDS):
        if process.poll() is not None:
            raise RuntimeError(f"The server ended with exit code {process.returncode}:\n{log.read_text()[-3000:]}")
        try:
            if requests.get(url, timeout=60).status_code == 200:
                return
        except requests.RequestException:
            pass
        time.sleep(1)
    raise RuntimeError(f"The server was not ready after {START_SECONDS} s:\n{log.read_text()[-3000:]}")
