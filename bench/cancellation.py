"""`make cancellation`: measures how soon a cancelled job frees its slot.

Queue: the worker runs one job at a time. A long job is cancelled while a short one waits. The time from the
cancellation to the short job's result contains the stop signal, the engine's abort, taking the short job, and its only
token. HTTP: the time from the moment a client closes its stream until `/health` reports no job.
"""

import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

from bench.servers import http_worker, worker

CANCELLATIONS = 20
ENDLESS = {"prompt": "Once upon a time", "max_tokens": 1900, "ignore_eos": True}
SHORT = {"prompt": "Hello", "max_tokens": 1}


def main() -> int:
    """Measure, and print the results as JSON."""
    with (
        tempfile.TemporaryDirectory() as folder,
        worker("worker", Path(folder) / "worker.log", MAX_CONCURRENCY="1") as server,
    ):
        results = asyncio.run(run(server.endpoint_url))
    with tempfile.TemporaryDirectory() as folder, http_worker(Path(folder) / "worker.log") as server:
        results["over HTTP, after a client has disconnected"] = asyncio.run(run_http(server.base_url))
    sys.stdout.write(json.dumps(results, indent=1) + "\n")
    return 0


async def run(url: str) -> dict[str, dict[str, float]]:
    """Return times in milliseconds: of the short job alone, after a streaming job, and after one without streaming."""
    async with aiohttp.ClientSession() as session:

        async def post(route: str, body: object = None) -> Any:
            async with session.post(f"{url}/{route}", json=body) as response:
                return await response.json()

        async def short_job_alone() -> float:
            started = time.perf_counter()
            await post("runsync", {"input": SHORT})
            return time.perf_counter() - started

        async def cancelled(stream: bool) -> float:
            job = await post("run", {"input": {**ENDLESS, "stream": stream}})
            waiting = asyncio.create_task(post("runsync", {"input": SHORT}))
            await asyncio.sleep(0.3)
            started = time.perf_counter()
            await post(f"cancel/{job['id']}")
            await waiting
            return time.perf_counter() - started

        return {
            "the short job alone": _milliseconds([await short_job_alone() for _ in range(CANCELLATIONS)]),
            "after a cancelled streaming job": _milliseconds([await cancelled(True) for _ in range(CANCELLATIONS)]),
            "after a cancelled other job": _milliseconds([await cancelled(False) for _ in range(CANCELLATIONS)]),
        }


async def run_http(url: str) -> dict[str, float]:
    """Return the times in milliseconds from a client's disconnection until the worker has no job."""
    async with aiohttp.ClientSession() as session:

        async def after_disconnection() -> float:
            body = {**ENDLESS, "model": "tiny", "stream": True}
            async with session.post(f"{url}/completions", json=body) as stream:
                await stream.content.readany()
                stream.close()
            started = time.perf_counter()
            while True:
                async with session.get(f"{url.removesuffix('/v1')}/health") as response:
                    if (await response.json())["jobs"] == 0:
                        return time.perf_counter() - started

        return _milliseconds([await after_disconnection() for _ in range(CANCELLATIONS)])


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    return {"median": round(1000 * statistics.median(seconds), 1), "maximum": round(1000 * max(seconds), 1)}


if __name__ == "__main__":
    sys.exit(main())
