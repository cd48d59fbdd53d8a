"""`make soak`: a quarter of an hour of mixed jobs, cancels and faults on the whole worker; prints a table.

Every job must end exactly once, and memory and file descriptors must stay flat; the exit code is 1 otherwise.
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
from tests.support.links import Server as Links
from tests.support.tiny import ROOT

WARM_UP_SECONDS = 60
AT_ONCE = 24
ALLOWED_GROWTH_MB = 60.0
ALLOWED_DESCRIPTORS = 8
CANCELLED = 0.15
FAULTY = 0.03
"""Shares of the jobs that are cancelled, and of the requests of the worker that go wrong."""
FAULTS = (Fault(status=500), Fault(status=429), Fault(reset=True), Fault(delay=0.5), Fault(cut=True))
RESULTS = Path(__file__).parent.parent / "docs" / "benchmarks"


@dataclass(slots=True)
class Soak:
    """What was seen."""

    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)


class FaultyBehaviour(Behaviour):
    """Now and then something goes wrong; a job that is taken arrives all the same."""

    chance = random.Random(7)  # noqa: S311 - nothing is secret

    def next_fault(self, kind: Any) -> Fault:
        if self.chance.random() >= FAULTY or kind == "ping":
            return Fault()
        fault = self.chance.choice(FAULTS)
        return Fault(status=503) if kind == "take" and fault.cut else fault


def main(arguments: list[str]) -> int:
    """Run, report, and judge."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=15)
    options = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory() as folder,
        StandinServer(Platform(FaultyBehaviour())) as server,
        Links() as links,
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


async def run(server: StandinServer, links: Links, worker: psutil.Process, seconds: float, soak: Soak) -> None:
    """Keep so many jobs in flight until the time is up, and look at the worker every second."""
    deadline = time.monotonic() + seconds
    chance = random.Random(1)  # noqa: S311 - nothing is secret

    async def client() -> None:
        while time.monotonic() < deadline:
            await one_job(server, links, chance, soak)

    async def watch() -> None:
        began = time.monotonic()
        while time.monotonic() < deadline:
            await asyncio.sleep(1)
            if time.monotonic() - began > WARM_UP_SECONDS:
                soak.memory.append(worker.memory_full_info().pss / 1e6)
                soak.descriptors.append(worker.num_fds())

    await asyncio.gather(watch(), *(client() for _ in range(AT_ONCE)))


async def one_job(server: StandinServer, links: Links, chance: random.Random, soak: Soak) -> None:
    """Send a job of some kind, perhaps cancel it, and see how it ends."""
    kind, job_input, right = job_of(chance, links)
    job: Job = await asyncio.wrap_future(server.start(_submit(server, job_input)))
    cancel = chance.random() < CANCELLED
    ending = asyncio.wrap_future(server.start(_ended(job)))
    if cancel:
        await asyncio.wait({ending}, timeout=chance.uniform(0, 0.5))
        server.call(server.platform.cancel, job)
    try:
        await asyncio.wait_for(ending, timeout=120)
    except TimeoutError:
        soak.wrong.append(f"{kind}: not ended after 120 s")
        return
    soak.ended[f"{kind}: {job.status.lower()}"] += 1
    expected = Status.FAILED if kind == "wrong" else Status.COMPLETED
    if job.status is not expected and not (cancel and job.status is Status.CANCELLED):
        soak.wrong.append(f"{kind}: {job.status}: {str(job.error)[:200]}")
    elif job.status is Status.COMPLETED and right not in json.dumps(job.output):
        soak.wrong.append(f"{kind}: another answer: {json.dumps(job.output)[:200]}")


async def _submit(server: StandinServer, job_input: Any) -> Job:
    return server.platform.submit({"input": job_input})


async def _ended(job: Job) -> None:
    await job.changed.until(lambda: job.ended)


def job_of(chance: random.Random, links: Links) -> tuple[str, Any, str]:
    """Return a kind of job, its input, and what its answer must hold."""
    stream = chance.random() < 0.5
    match chance.choices(("text", "image", "link", "video", "wrong"), (60, 20, 8, 5, 7))[0]:
        case "image":
            colour = chance.choice(media.COLOURS)
            return "image", {"prompt": "What is this?", "image": media.image_url(colour), "stream": stream}, "image"
        case "link":
            return "link", {"prompt": "What is this?", "image": f"{links.url}/picture/red", "stream": stream}, "image"
        case "video":
            film = media.encoded(media.film("red", "blue"))
            return "video", {"prompt": "What happens?", "video": film}, "from red to blue"
        case "wrong":
            return "wrong", chance.choice([{"text": "?"}, {"messages": []}, {"prompt": "?", "image": "AAAA"}, 7]), ""
    tokens = chance.choice([5, 40, 200])
    return "text", {"prompt": "Once", "max_tokens": tokens, "ignore_eos": True, "stream": stream}, "choices"


def report(soak: Soak, platform: Platform, minutes: float) -> int:
    """Print the table, keep it, and return the exit code."""
    cancelled = {job.id for job in platform.jobs.values() if job.status is Status.CANCELLED}
    doubled = {*platform.records.duplicate_dones, *platform.records.late_streams} - cancelled
    third = max(len(soak.memory) // 3, 1)
    growth = statistics.median(soak.memory[-third:]) - statistics.median(soak.memory[:third])
    opened = statistics.median(soak.descriptors[-third:]) - statistics.median(soak.descriptors[:third])
    rows = [
        ("jobs", sum(soak.ended.values())),
        *sorted(soak.ended.items()),
        ("ended wrongly or not at all", len(soak.wrong)),
        ("answered twice or late, and not cancelled", len(doubled)),
        ("memory of the worker after a minute, MB", round(statistics.median(soak.memory[:third]))),
        ("growth from the first third to the last, MB", round(growth, 1)),
        ("growth of its file descriptors", round(opened)),
    ]
    table = "".join(f"| {name} | {value} |\n" for name, value in rows)
    text = (
        f"# A soak of {minutes:g} minutes\n\n`make soak` on {os.cpu_count()} cores: {AT_ONCE} jobs at once of text, "
        f"images, links and videos, {CANCELLED:.0%} cancelled; {FAULTY:.0%} of the worker's requests to the platform "
        f"met an error, a reset, a delay or half an answer.\n\n| | |\n| --- | --- |\n{table}"
    )
    sys.stdout.write(text + "".join(f"{one}\n" for one in soak.wrong[:20]))
    (RESULTS / "soak.md").write_text(text)
    return int(bool(soak.wrong or doubled or growth > ALLOWED_GROWTH_MB or opened > ALLOWED_DESCRIPTORS))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
