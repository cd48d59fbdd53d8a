"""`make bench-cluster`: compares a cluster of two machines with one machine that has the cores of both.

Both run two copies of the embedded model, one on each core. The machines of the cluster are network namespaces.
Requests come over HTTP, and as jobs of a queue. Both are measured in turn.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from standin import StandinServer, Status, worker_environment
from tests.support.machines import Machine, Machines, completion, joined_machines, ready
from tests.support.namespaces import obstacle
from tests.support.tiny import ROOT

REQUESTS = 192
AT_ONCE = 48
TOKENS = 100
SECONDS = 300
KINDS = ("cluster", "one machine")

Load = Callable[[Machines, str], float]
"""Starts the workers of a kind, and returns the tokens that they generate in a second."""


def main(arguments: list[str]) -> int:
    """Measure, then print the table and write the results to docs/benchmarks."""
    parser = argparse.ArgumentParser(prog="python -m bench.cluster", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/cluster.json")
    options = parser.parse_args(arguments)
    if (reason := obstacle()) is not None:
        sys.stderr.write(f"{reason}\n")
        return 1
    loads: dict[str, Load] = {"http": _http, "queue": _queue}
    results = {way: _measure(load, options.rounds) for way, load in loads.items()}
    written = {"cores": os.cpu_count(), "model": "tiny", "tokens_per_second": results}
    options.out.write_text(json.dumps(written, indent=1) + "\n")
    sys.stdout.write(table(results))
    return 0


def _measure(load: Load, rounds: int) -> dict[str, list[float]]:
    """Return the tokens per second of each round."""
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        for kind in KINDS if number % 2 == 0 else KINDS[::-1]:
            with tempfile.TemporaryDirectory() as folder, joined_machines(Path(folder), {}) as machines:
                rates[kind].append(round(load(machines, kind), 1))
                sys.stderr.write(f"{load.__name__[1:]}, {kind}: {rates[kind][-1]} tokens/s\n")
    return rates


def _start(machines: Machines, kind: str, **environment: str) -> list[Machine]:
    if kind == "cluster":
        return [machines.start(rank, **environment) for rank in (0, 1)]
    machines.cores = 2
    return [machines.start(0, NUM_NODES="1", DATA_PARALLEL_SIZE="2", **environment)]


def _http(machines: Machines, kind: str) -> float:
    head, *_ = ready(*_start(machines, kind))
    with head.client() as api, ThreadPoolExecutor(AT_ONCE) as pool:

        def ask(_number: int) -> int:
            answer = api.post("/v1/completions", json=completion(TOKENS), timeout=SECONDS)
            return int(answer.json()["usage"]["completion_tokens"])

        list(pool.map(ask, range(AT_ONCE)))
        began = time.monotonic()
        return sum(pool.map(ask, range(REQUESTS))) / (time.monotonic() - began)


def _queue(machines: Machines, kind: str) -> float:
    with StandinServer() as server:
        queue = worker_environment(server.port)
        _start(machines, kind, WORKER_MODE="queue", **queue)
        server.wait_until(lambda platform: bool(platform.records.takes), SECONDS)

        def answer(count: int) -> float:
            began = time.monotonic()
            jobs = [server.call(server.platform.submit, {"input": completion(TOKENS)}) for _ in range(count)]
            server.wait_until(lambda _: all(job.status is Status.COMPLETED for job in jobs), SECONDS)
            return time.monotonic() - began

        answer(AT_ONCE)
        return REQUESTS * TOKENS / answer(REQUESTS)


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Return the medians and their ratio as a table."""
    lines = [
        "| requests | cluster, tokens/s | one machine, tokens/s | ratio, median of rounds |",
        "| --- | --- | --- | --- |",
    ]
    for way, rates in results.items():
        cluster, alone = (rates[kind] for kind in KINDS)
        ratio = statistics.median(mine / theirs for mine, theirs in zip(cluster, alone, strict=True))
        lines.append(f"| {way} | {statistics.median(cluster):.0f} | {statistics.median(alone):.0f} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
