"""Workers on machines of their own, which are a cluster: `python handler.py` in network namespaces."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from standin import WorkerProcess
from tests.support import tiny
from tests.support.namespaces import Cable, cable

START_SECONDS = 300
"""Two workers with one core each take 25 s on an idle machine, and have taken 130 s on a busy one."""
PORT = 8000
# vLLM looks for processes of the same machine by shared memory, so that each machine needs its own.
OWN_SHARED_MEMORY = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs shm /dev/shm && exec "$@"', "sh"]


class Machine:
    """One machine of the cluster, and the worker on it. Node 0 is the head."""

    def __init__(self, rank: int, address: str, log: Path, worker: WorkerProcess) -> None:
        self.rank = rank
        self.address = address
        self.worker = worker
        self._log = log

    @property
    def url(self) -> str:
        return f"http://{self.address}:{PORT}"

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=10)

    def ping(self) -> int:
        """Return the status of `/ping`, or 0 if the connection fails."""
        try:
            return self.get("/ping").status_code
        except httpx.TransportError:
            return 0

    def is_ready(self) -> bool:
        """Return whether `/ping` answers 200. The test fails if the worker has ended."""
        ended = psutil.Process(self.worker.pid).status() == psutil.STATUS_ZOMBIE
        assert not ended, f"Node {self.rank} has ended:\n{self.log[-6000:]}"
        return self.ping() == 200

    def wait_until(self, condition: Callable[[], bool], seconds: float, problem: str) -> None:
        """Wait for a condition. After so many seconds the test fails with `problem` and the end of the log."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{problem}; the log of node {self.rank}:\n{self.log[-6000:]}"
            time.sleep(0.1)

    def children(self, name: str = "") -> list[psutil.Process]:
        """Return the processes that the worker has started and whose names begin so."""
        children = psutil.Process(self.worker.pid).children(recursive=True)
        return [child for child in children if child.name().startswith(name)]

    def send(self, number: int) -> None:
        """Send a signal to the worker only."""
        self.worker.send_signal(number)

    def code(self, seconds: float = 30) -> int:
        """Wait for the worker's end, and return its exit code."""
        return self.worker.wait(timeout=seconds)


class Machines:
    """Starts workers on the machines that `network` joins."""

    def __init__(self, network: Cable, folder: Path, running: ExitStack, environment: Mapping[str, str]) -> None:
        self.network = network
        self.cores = 1
        """The number of CPU cores of each machine."""
        self._folder = folder
        self._running = running
        self._environment = environment

    def start(self, rank: int, arguments: Sequence[str] = (), **environment: str) -> Machine:
        """Start a worker with RunPod's variables for this node. It ends at the end of the block at the latest."""
        log = self._folder / f"node-{rank}-{time.monotonic_ns()}.log"
        output = self._running.enter_context(log.open("wb"))
        cores = sorted(os.sched_getaffinity(0))
        used = [cores[(rank + number) % len(cores)] for number in range(self.cores)]
        program = [
            "taskset",
            "--cpu-list",
            ",".join(map(str, used)),
            sys.executable,
            str(tiny.ROOT / "handler.py"),
            *arguments,
        ]
        command = [*self.network.prefix(rank), *OWN_SHARED_MEMORY, *program]
        variables = {**self._variables(rank), **self._environment, **environment}
        worker = self._running.enter_context(WorkerProcess(command, variables, output))
        return Machine(rank, self.network.addresses[rank], log, worker)

    def _variables(self, rank: int) -> dict[str, str]:
        """Return the variables of the embedded model, and those that RunPod sets on the node of a cluster."""
        model = tiny.environment()
        # The CPU platform then binds each process to the cores of its own.
        del model["VLLM_WORKER_MULTIPROC_METHOD"]
        addresses = self.network.addresses
        head, port = addresses[0], "29501"
        return {
            **model,
            "NUM_NODES": str(len(addresses)),
            "NODE_RANK": str(rank),
            "NODE_ADDR": addresses[rank],
            "PRIMARY_ADDR": head,
            "PRIMARY_PORT": port,
            "MASTER_ADDR": head,
            "MASTER_PORT": port,
            "HOST_NODE_ADDR": f"{head}:{port}",
            "WORLD_SIZE": str(len(addresses)),
            "RUNPOD_POD_ID": f"node-{rank}",
        }

    def start_all(self, **environment: str) -> list[Machine]:
        """Start a worker on each machine, and wait until they are ready."""
        return ready(*(self.start(rank, **environment) for rank in range(len(self.network.addresses))))


def ready(*machines: Machine) -> list[Machine]:
    """Wait until these workers are ready."""
    for machine in machines:
        machine.wait_until(machine.is_ready, START_SECONDS, "the worker is not ready")
    return list(machines)


@contextmanager
def joined_machines(folder: Path, environment: Mapping[str, str], count: int = 2) -> Iterator[Machines]:
    """Join machines for a block. This thread, and threads that it starts, use the head's network."""
    with cable(count) as network, network.entered(0), ExitStack() as running:
        yield Machines(network, folder, running, environment)


def codes_within(seconds: float, *machines: Machine) -> list[int]:
    """Wait until these workers have ended, at most so long altogether, and return their exit codes."""
    deadline = time.monotonic() + seconds
    return [machine.code(max(deadline - time.monotonic(), 0.01)) for machine in machines]


def completion(tokens: int, **fields: Any) -> dict[str, Any]:
    """Return the body of a request for a text of this length."""
    return {"prompt": "Once", "max_tokens": tokens, "ignore_eos": True, **fields}
