"""`make cancellation`: how soon a job that nobody waits for any more makes room.

In the queue: from the cancellation to the next job's answer. The worker takes one job at a time. One that generates for
long is cancelled while another waits for its slot; the time until that other is answered holds the stop signal, the
engine's abort, the taking, and the other's one token. Over HTTP: from the client's leaving its stream until the worker
has no job, as `/health` tells.
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
    """Cancel jobs and report."""
    with (
        tempfile.TemporaryDirectory() as folder,
        worker("worker", Path(folder) / "worker.log", MAX_CONCURRENCY="1") as server,
    ):
        results = asyncio.run(run(server.endpoint_url))
    with tempfile.TemporaryDirectory() as folder, http_worker(Path(folder) / "worker.log") as server:
        results["over HTTP, after a client has left"] = asyncio.run(run_http(server.base_url))
    sys.stdout.write(json.dumps(results, indent=1) + "\n")
    return 0


async def run(url: str) -> dict[str, dict[str, float]]:
    """Return milliseconds, for jobs that stream and for jobs that do not; first what the short job takes alone."""
    async with aiohttp.ClientSession() as session:

        async def post(route: str, body: object = None) -> Any:
            async with session.post(f"{url}/{route}", json=body) as answer:
                return await answer.json()

        async def alone() -> float:
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
            "the short job alone": _milliseconds([await alone() for _ in range(CANCELLATIONS)]),
            "after a cancelled stream": _milliseconds([await cancelled(True) for _ in range(CANCELLATIONS)]),
            "after a cancelled whole answer": _milliseconds([await cancelled(False) for _ in range(CANCELLATIONS)]),
        }


async def run_http(url: str) -> dict[str, float]:
    """Return milliseconds."""
    async with aiohttp.ClientSession() as session:

        async def left() -> float:
            body = {**ENDLESS, "model": "tiny", "stream": True}
            async with session.post(f"{url}/completions", json=body) as stream:
                await stream.content.readany()
                stream.close()
            started = time.perf_counter()
            while True:
                async with session.get(f"{url.removesuffix('/v1')}/health") as answer:
                    if (await answer.json())["jobs"] == 0:
                        return time.perf_counter() - started

        return _milliseconds([await left() for _ in range(CANCELLATIONS)])


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    return {"median": round(1000 * statistics.median(seconds), 1), "most": round(1000 * max(seconds), 1)}


if __name__ == "__main__":
    sys.exit(main())
