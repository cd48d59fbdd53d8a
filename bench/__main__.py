"""`make bench`: the worker behind the platform's stand-in against `vllm serve` asked directly, alternating, in one run.

Each cell is measured in turn on every server, so often as `--rounds` says; figures are medians over the rounds.
"""

import argparse
import asyncio
import os
import platform
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import psutil

from bench import load, report
from bench.load import Load
from bench.servers import SDK_LOOP, Server, http_worker, vllm_serve, worker
from tests.support.tiny import ROOT

WARM_UP = Load(concurrency=8, requests=16, tokens=32, stream=True)


def main(arguments: list[str]) -> int:
    """Measure, print the table, write the numbers and the plot."""
    options = _parse(arguments)
    cells = [
        Load(concurrency, max(options.requests, 3 * concurrency), options.tokens, stream)
        for concurrency in options.concurrency
        for stream in (True, False)
    ]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = _start(stack, folder, options.servers)
        for server in servers:
            asyncio.run(load.run(server.base_url, WARM_UP))
        rounds = [_round(servers, cells, number, options.rounds) for number in range(options.rounds)]
    result = {"machine": _machine(), "command": "python -m bench " + " ".join(arguments), "cells": _medians(rounds)}
    report.write(result, Path(options.out))
    sys.stdout.write(report.table(result))
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--requests", type=int, default=12, help="in each cell; at least three per client")
    parser.add_argument("--tokens", type=int, default=256, help="of an answer, on average")
    parser.add_argument(
        "--servers",
        nargs="+",
        choices=["worker", "http", "sdk-loop"],
        default=["worker", "http"],
        help="beside vllm serve: the worker of the queue, over HTTP, under the SDK's own loop",
    )
    parser.add_argument("--out", default=str(ROOT / "docs/benchmarks/streaming"), help="FILE.json, .md and .svg")
    return parser.parse_args(arguments)


def _start(stack: ExitStack, folder: Path, names: list[str]) -> list[Server]:
    ways = {
        "worker": lambda: worker("worker", folder / "worker.log"),
        "http": lambda: http_worker(folder / "http.log"),
        "sdk-loop": lambda: worker("sdk-loop", folder / "sdk-loop.log", SDK_LOOP),
    }
    starts = [("vllm serve", vllm_serve(folder / "vllm.log")), *((name, ways[name]()) for name in names)]
    servers = []
    for name, starting in starts:
        _say(f"Starting {name}")
        servers.append(stack.enter_context(starting))
    return servers


def _round(servers: list[Server], cells: list[Load], number: int, rounds: int) -> list[dict[str, dict[str, float]]]:
    measured = []
    for cell in cells:
        way = "streaming" if cell.stream else "not streaming"
        _say(f"Round {number + 1} of {rounds}: {cell.concurrency} at once, {way}")
        # Every other round goes the other way about, so that a drift of the machine favours nobody.
        turn = servers if number % 2 == 0 else servers[::-1]
        figures = {server.name: _measure(server, cell) for server in turn}
        measured.append({server.name: figures[server.name] for server in servers})
    return measured


def _measure(server: Server, cell: Load) -> dict[str, float]:
    cpu, posts = server.cpu_seconds(), server.posts()
    timings = asyncio.run(load.run(server.base_url, cell))
    thousands = timings.tokens / 1000
    return {
        **timings.figures(),
        "CPU s per 1000 tokens": (server.cpu_seconds() - cpu) / thousands,
        "memory MB": server.memory_mb(),
        "POSTs per token": (server.posts() - posts) / timings.tokens,
        "concurrency": cell.concurrency,
        "stream": cell.stream,
    }


def _medians(rounds: list[list[dict[str, dict[str, float]]]]) -> list[dict[str, dict[str, float]]]:
    """Return, for every cell and server, the median of each figure over the rounds."""
    return [
        {
            server: {name: statistics.median(one[server][name] for one in cell) for name in cell[0][server]}
            for server in cell[0]
        }
        for cell in zip(*rounds, strict=True)
    ]


def _machine() -> dict[str, object]:
    return {
        "cores": os.cpu_count(),
        "memory GB": round(psutil.virtual_memory().total / 1e9),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
