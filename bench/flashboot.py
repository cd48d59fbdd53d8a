"""`make bench-flashboot`: measures the first token of a job after the whole worker was frozen, as FlashBoot does.

Each round measures a job of a warm worker, then freezes all processes of the worker, lets all its connections to
RunPod's stand-in die without a sign, resumes the processes, and measures a job that is submitted at the same moment.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from standin import StandinServer, WorkerProcess, worker_environment
from tests.support import tiny
from tests.support.freezing import frozen
from tests.support.proxy import Proxy
from tests.support.tiny import ROOT

JOB = {"input": {"prompt": "Hello", "max_tokens": 8, "stream": True}}
START_SECONDS = 300
ANSWER_SECONDS = 120
PAUSE_SECONDS = 1.0
"""Before each job, so that the worker is idle."""


def main(arguments: list[str]) -> int:
    """Measure, then print the table and write the results to docs/benchmarks."""
    parser = argparse.ArgumentParser(prog="python -m bench.flashboot", description=__doc__)
    parser.add_argument("--seconds", nargs="+", type=float, default=[5.0, 60.0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/flashboot.json")
    options = parser.parse_args(arguments)
    kept = json.loads(options.out.read_text())["freezes"] if options.out.is_file() else {}
    results = kept | {f"{seconds:g}": _measure(seconds, options.rounds) for seconds in options.seconds}
    results = dict(sorted(results.items(), key=lambda item: float(item[0])))
    options.out.write_text(json.dumps({"cores": os.cpu_count(), "model": "tiny", "freezes": results}, indent=1) + "\n")
    sys.stdout.write(table(results))
    return 0


def _measure(seconds: float, rounds: int) -> dict[str, Any]:
    """Return the first-token times of each round, in milliseconds."""
    warm: list[float] = []
    resumed: list[float] = []
    with (
        tempfile.TemporaryFile("w+") as log,
        StandinServer() as server,
        Proxy(server.port) as proxy,
        WorkerProcess(
            [sys.executable, "handler.py"], tiny.environment() | worker_environment(proxy.port), log
        ) as worker,
    ):
        server.wait_until(lambda platform: platform.ready_workers(), START_SECONDS)
        _first_token(server)
        for _ in range(rounds):
            time.sleep(PAUSE_SECONDS)
            warm.append(_first_token(server))
            time.sleep(PAUSE_SECONDS)
            with frozen(worker.pid):
                proxy.lose_connections()
                time.sleep(seconds)
            resumed.append(_first_token(server))
            sys.stderr.write(f"{seconds:g} s: warm {warm[-1]:.0f} ms, resumed {resumed[-1]:.0f} ms\n")
    return {"warm_ms": warm, "resumed_ms": resumed}


def _first_token(server: StandinServer) -> float:
    """Submit a job, and return the milliseconds until the first part of its stream has arrived."""
    began = time.perf_counter()
    job = server.call(server.platform.submit, JOB)
    server.wait_until(lambda _: job.chunks, ANSWER_SECONDS)
    milliseconds = 1000 * (time.perf_counter() - began)
    server.wait_until(lambda _: job.ended, ANSWER_SECONDS)
    return round(milliseconds, 1)


def table(results: dict[str, Any]) -> str:
    """Return a Markdown table. The largest of ten values is also their 95th percentile."""
    lines = [
        "| frozen for | rounds | warm, median | resumed, median | added, median | added, largest |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for seconds, result in results.items():
        warm, resumed = result["warm_ms"], result["resumed_ms"]
        added = [after - before for before, after in zip(warm, resumed, strict=True)]
        figures = map(statistics.median, (warm, resumed, added))
        medians = " | ".join(f"{figure:.0f} ms" for figure in figures)
        lines.append(f"| {seconds} s | {len(added)} | {medians} | {max(added):.0f} ms |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
