"""Measures what a batch costs the callers beside it: the time to the first token of their streams."""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import httpx

from bench.load import Load, run
from bench.servers import Server, http_worker

LINES = 20_000
"""The batch must last longer than a measurement."""
CALLERS = Load(concurrency=8, requests=160, tokens=64, stream=True)
FIRST = Load(concurrency=1, requests=1, tokens=64, stream=True)
FULL_SECONDS = 4.0
"""After so long the batch has the whole engine."""

Figures = dict[str, float]


def measure(rounds: int, lines: Iterable[Any], folder: Path) -> dict[str, Any]:
    """Return the median figures of the rounds."""
    content = "".join(f"{json.dumps(each)}\n" for each in lines).encode()
    with http_worker(folder / "http.log", BATCH_FOLDER=str(folder / "batches")) as server:
        client = httpx.Client(base_url=f"{server.base_url}/", timeout=60)
        _callers(server)
        figures = [_round(server, client, content) for _ in range(rounds)]
    return {name: round(statistics.median(each[name] for each in figures), 2) for name in figures[0]}


def _round(server: Server, client: httpx.Client, content: bytes) -> Figures:
    alone = _callers(server)
    first_alone = _first(server)
    batch_id = _begin(client, content)
    full = _lines_per_second(client, batch_id, lambda: time.sleep(FULL_SECONDS))
    # It finds an engine that is full of lines.
    first = _first(server)
    # Those lines end.
    time.sleep(2)
    measured: list[float] = []
    yielding = _lines_per_second(client, batch_id, lambda: measured.append(_callers(server)))
    client.post(f"batches/{batch_id}/cancel").raise_for_status()
    while client.get(f"batches/{batch_id}").json()["status"] != "cancelled":
        time.sleep(0.1)
    figures = {
        "p95 alone, ms": alone,
        "p95 beside a batch, ms": measured[0],
        "ratio of p95": measured[0] / alone,
        "first question alone, ms": first_alone,
        "first question into a full engine, ms": first,
        "lines/s alone": full,
        "lines/s beside callers": yielding,
    }
    sys.stderr.write(f"{json.dumps({name: round(value, 2) for name, value in figures.items()})}\n")
    return figures


def _callers(server: Server) -> float:
    """Return the 95th percentile of the callers' times to the first token, in milliseconds."""
    return asyncio.run(run(server.base_url, CALLERS)).figures()["TTFT p95 ms"]


def _first(server: Server) -> float:
    return 1000 * asyncio.run(run(server.base_url, FIRST)).first_token[0]


def _begin(client: httpx.Client, content: bytes) -> str:
    files = {"file": ("in.jsonl", content)}
    file = client.post("files", data={"purpose": "batch"}, files=files).raise_for_status().json()
    body = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch_id = str(client.post("batches", json=body).raise_for_status().json()["id"])
    while not _completed(client, batch_id):
        time.sleep(0.1)
    # The last callers are still waited for.
    time.sleep(12)
    return batch_id


def _completed(client: httpx.Client, batch_id: str) -> int:
    return int(client.get(f"batches/{batch_id}").raise_for_status().json()["request_counts"]["completed"])


def _lines_per_second(client: httpx.Client, batch_id: str, work: Callable[[], object]) -> float:
    before, began = _completed(client, batch_id), time.monotonic()
    work()
    return (_completed(client, batch_id) - before) / (time.monotonic() - began)
