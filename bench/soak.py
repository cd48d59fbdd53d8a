"""`make soak`: runs mixed jobs, cancellations and faults for 15 minutes on the whole worker, and prints a table.

The exit code is 1 unless every job ends exactly once, and memory and open file descriptors hardly grow.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from standin import Behaviour, Fault, Job, Platform, StandinServer, Status, WorkerProcess, worker_environment
from tests.support import media, tiny
from tests.support.links import Server as LinkServer
from tests.support.tiny import ROOT

WARM_UP_SECONDS = 60
CONCURRENCY = 24
ALLOWED_GROWTH_MB = 60.0
ALLOWED_DESCRIPTORS = 8
CANCELLED_SHARE = 0.15
FAULT_SHARE = 0.03
"""Shares of the jobs that are cancelled, and of the worker's requests to the platform that get a fault."""
FAULTS = (Fault(status=500), Fault(status=429), Fault(reset=True), Fault(delay=0.5), Fault(cut=True))
RESULTS = Path(__file__).parent.parent / "docs" / "benchmarks"


@dataclass(slots=True)
class Soak:
    """The observations. After the warm-up, memory (in MB) and file descriptors are measured every second."""

    endings: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)


class FaultyBehaviour(Behaviour):
    """Gives random faults to the worker's requests."""

    rng = random.Random(7)  # noqa: S311 - nothing is secret

    def next_fault(self, kind: Any) -> Fault:
        if self.rng.random() >= FAULT_SHARE or kind == "ping":
            return Fault()
        fault = self.rng.choice(FAULTS)
        # A truncated answer to a job-take would lose its jobs.
        return Fault(status=503) if kind == "take" and fault.cut else fault


def main(arguments: list[str]) -> int:
    """Run the soak test, print and write its table, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=15)
    options = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory() as folder,
        StandinServer(Platform(FaultyBehaviour())) as server,
        LinkServer() as links,
    ):
        environ = {**tiny.environment(), **worker_environment(server.port), "MEDIA_ALLOW_PRIVATE_NETWORKS": "true"}
        log = Path(folder) / "log"
        with (
            log.open("wb") as output,
            WorkerProcess([sys.executable, str(ROOT / "handler.py")], environ, output) as worker,
        ):
            server.wait_until(lambda platform: platform.records.takes, timeout=180)
            soak = Soak()
            asyncio.run(run(server, links, psutil.Process(worker.pid), 60 * options.minutes, soak))
    return report(soak, server.platform, options.minutes)


async def run(server: StandinServer, links: LinkServer, worker: psutil.Process, seconds: float, soak: Soak) -> None:
    """Keep CONCURRENCY jobs in flight for `seconds`, and measure the worker every second."""
    deadline = time.monotonic() + seconds
    rng = random.Random(1)  # noqa: S311 - nothing is secret

    async def client() -> None:
        while time.monotonic() < deadline:
            await run_job(server, links, rng, soak)

    async def watch() -> None:
        began = time.monotonic()
        while time.monotonic() < deadline:
            await asyncio.sleep(1)
            if time.monotonic() - began > WARM_UP_SECONDS:
                soak.memory.append(worker.memory_full_info().pss / 1e6)
                soak.descriptors.append(worker.num_fds())

    await asyncio.gather(watch(), *(client() for _ in range(CONCURRENCY)))


async def run_job(server: StandinServer, links: LinkServer, rng: random.Random, soak: Soak) -> None:
    """Send a random job, perhaps cancel it, and check how it ends."""
    kind, job_input, expected_text = random_job(rng, links)
    job: Job = await asyncio.wrap_future(server.start(_submit(server, job_input)))
    cancel = rng.random() < CANCELLED_SHARE
    ending = asyncio.wrap_future(server.start(_ended(job)))
    if cancel:
        await asyncio.wait({ending}, timeout=rng.uniform(0, 0.5))
        server.call(server.platform.cancel, job)
    try:
        await asyncio.wait_for(ending, timeout=120)
    except TimeoutError:
        soak.failures.append(f"{kind}: not ended after 120 s")
        return
    soak.endings[f"{kind}: {job.status.lower()}"] += 1
    expected = Status.FAILED if kind == "invalid" else Status.COMPLETED
    if job.status is not expected and not (cancel and job.status is Status.CANCELLED):
        soak.failures.append(f"{kind}: {job.status}: {str(job.error)[:200]}")
    elif job.status is Status.COMPLETED and expected_text not in json.dumps(job.output):
        soak.failures.append(f"{kind}: no {expected_text!r} in the output: {json.dumps(job.output)[:200]}")


async def _submit(server: StandinServer, job_input: Any) -> Job:
    return server.platform.submit({"input": job_input})


async def _ended(job: Job) -> None:
    await job.changed.until(lambda: job.ended)


def random_job(rng: random.Random, links: LinkServer) -> tuple[str, Any, str]:
    """Return the kind of a job, its input, and a text that its output must contain."""
    stream = rng.random() < 0.5
    match rng.choices(("text", "image", "link", "video", "invalid"), (60, 20, 8, 5, 7))[0]:
        case "image":
            colour = rng.choice(media.COLOURS)
            return "image", {"prompt": "What is this?", "image": media.image_url(colour), "stream": stream}, "image"
        case "link":
            return "link", {"prompt": "What is this?", "image": f"{links.url}/picture/red", "stream": stream}, "image"
        case "video":
            film = media.encoded(media.film("red", "blue"))
            return "video", {"prompt": "What happens?", "video": film}, "from red to blue"
        case "invalid":
            return "invalid", rng.choice([{"text": "?"}, {"messages": []}, {"prompt": "?", "image": "AAAA"}, 7]), ""
    tokens = rng.choice([5, 40, 200])
    return "text", {"prompt": "Once", "max_tokens": tokens, "ignore_eos": True, "stream": stream}, "choices"


def report(soak: Soak, platform: Platform, minutes: float) -> int:
    """Print the table, write it to docs/benchmarks/soak.md, and return the exit code."""
    cancelled = {job.id for job in platform.jobs.values() if job.status is Status.CANCELLED}
    duplicates = {*platform.records.duplicate_dones, *platform.records.late_streams} - cancelled
    third = max(len(soak.memory) // 3, 1)
    growth = statistics.median(soak.memory[-third:]) - statistics.median(soak.memory[:third])
    opened = statistics.median(soak.descriptors[-third:]) - statistics.median(soak.descriptors[:third])
    rows = [
        ("jobs", sum(soak.endings.values())),
        *sorted(soak.endings.items()),
        ("jobs with a wrong result or none", len(soak.failures)),
        ("jobs answered twice or too late, without cancelled ones", len(duplicates)),
        ("memory of the worker in the first third, MB", round(statistics.median(soak.memory[:third]))),
        ("growth of its memory from the first to the last third, MB", round(growth, 1)),
        ("growth of its open file descriptors", round(opened)),
    ]
    table = "".join(f"| {name} | {value} |\n" for name, value in rows)
    text = (
        f"# Soak test of {minutes:g} minutes\n\n`make soak` on {os.cpu_count()} cores: {CONCURRENCY} concurrent jobs "
        f"with text, images, links and videos, {CANCELLED_SHARE:.0%} of them cancelled. {FAULT_SHARE:.0%} of the "
        f"worker's requests to the platform got an error, a reset, a delay or a truncated answer.\n\n"
        f"| | |\n| --- | --- |\n{table}"
    )
    sys.stdout.write(text + "".join(f"{failure}\n" for failure in soak.failures[:20]))
    (RESULTS / "soak.md").write_text(text)
    return int(bool(soak.failures or duplicates or growth > ALLOWED_GROWTH_MB or opened > ALLOWED_DESCRIPTORS))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
