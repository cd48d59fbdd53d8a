"""Observes a worker in HTTP mode while something else attacks it: `/ping`, memory, and requests of an honest caller."""

import http.client
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.conftest import HttpWorker, engine_processes
from tests.support import media
from tests.support.links import Server

SLOWNESS = float(os.environ.get("HOSTILE_SLOWNESS", "5"))
"""How many times as long as promised everything may take: other programs may use the machine. `make hostile` sets 1."""
PING_SECONDS = 1.0 * SLOWNESS
"""The longest time for an answer to `/ping`."""
IMAGE_SECONDS = 5.0 * SLOWNESS
"""The longest time for an answer to an honest request with an image."""
GROWTH_BYTES = 1_000_000_000
"""The most memory that a hostile request may cost."""
INTERVAL = 0.1
PATIENCE = 60.0


class Watch:
    """The worst of what was observed."""

    def __init__(self, worker: HttpWorker, links: Server) -> None:
        self._worker = worker
        self._links = links
        self._stopped = threading.Event()
        self._memory = memory_of(worker)
        self._log_bytes = worker.log.stat().st_size
        self._images = 0
        self.slowest_ping = 0.0
        self.slowest_image = 0.0
        self.growth = 0
        """Additional memory at its peak, in bytes."""
        self.faults: list[str] = []
        """Answers to honest requests that were wrong."""

    @property
    def log_growth(self) -> int:
        """The bytes that the worker has written to its log meanwhile, without the line that each request has."""
        with self._worker.log.open("rb") as log:
            log.seek(self._log_bytes)
            return sum(len(line) for line in log if b"worker.telemetry.jobs" not in line)

    def __str__(self) -> str:
        return (
            f"/ping {self.slowest_ping:.2f} s, image {self.slowest_image:.2f} s, memory {self.growth / 1e6:+.0f} MB, "
            f"log {self.log_growth / 1000:+.0f} kB{''.join(f'; {fault}' for fault in self.faults[:3])}"
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Observe during the block, at least one honest request long."""
        threads = [
            threading.Thread(target=self._repeat, args=(observe,)) for observe in (self._ping, self._ask, self._measure)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            for thread in threads:
                thread.join()

    def _repeat(self, observe: Callable[[http.client.HTTPConnection], None]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._worker.port, timeout=PATIENCE)
        while True:
            try:
                observe(connection)
            except (OSError, http.client.HTTPException) as error:
                self.faults.append(f"{observe.__name__.strip('_')}: {error!r}")
                connection.close()
            if self._stopped.wait(INTERVAL):
                return connection.close()

    def _ping(self, connection: http.client.HTTPConnection) -> None:
        began = time.monotonic()
        try:
            connection.request("GET", "/ping")
            response = connection.getresponse()
            response.read()
        finally:
            self.slowest_ping = max(self.slowest_ping, time.monotonic() - began)
        if response.status != 200:
            self.faults.append(f"/ping answered {response.status}")

    def _ask(self, connection: http.client.HTTPConnection) -> None:
        """Ask about an image that the worker has not seen before, by turns in base64 and by a link with a name."""
        self._images += 1
        # Each side is unique, because vLLM caches images.
        picture = media.picture("green", (64 + self._images % 64, 64 + self._images // 64))
        link = f"http://localhost:{self._links.server_port}/picture/green?{self._images}"
        url = media.data_url(picture, "image/png") if self._images % 2 else link
        began = time.monotonic()
        try:
            status, text = answer_to(connection, self._worker, url)
        finally:
            self.slowest_image = max(self.slowest_image, time.monotonic() - began)
        if status != 200 or "The image is green." not in text:
            self.faults.append(f"an honest image was answered with {status}: {text[:200]}")

    def _measure(self, _connection: http.client.HTTPConnection) -> None:
        self.growth = max(self.growth, memory_of(self._worker) - self._memory)

    def check(self) -> None:
        """Assert that nobody else suffered, and that the worker still answers."""
        assert not self.faults
        assert self.slowest_ping < PING_SECONDS
        assert self.slowest_image < IMAGE_SECONDS
        assert self.growth < GROWTH_BYTES
        assert serves(self._worker)


def answer_to(connection: http.client.HTTPConnection, worker: HttpWorker, url: str) -> tuple[int, str]:
    """Return the status and the body of a chat about one image."""
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": parts}], "max_tokens": 20})
    headers = {"authorization": f"Bearer {worker.key}", "content-type": "application/json"}
    connection.request("POST", "/v1/chat/completions", body, headers)
    response = connection.getresponse()
    return response.status, response.read().decode()


def serves(worker: HttpWorker) -> bool:
    """Return whether the worker answers a chat within a minute."""
    with suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection("127.0.0.1", worker.port, timeout=PATIENCE)
        status, text = answer_to(connection, worker, media.image_url("red"))
        connection.close()
        return status == 200 and "The image is red." in text
    return False


def memory_of(worker: HttpWorker) -> int:
    """Return the memory of the worker and its child processes without the engine, in bytes.

    Memory that processes share counts once: it is divided among them.
    """
    main = psutil.Process(worker.worker.pid)
    engines = engine_processes(worker.worker)
    excluded = {*engines, *(child for engine in engines for child in engine.children(recursive=True))}
    family = {main, *main.children(recursive=True)} - excluded
    return sum(map(_proportional_bytes, family))


def _proportional_bytes(process: psutil.Process) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    return 0
