"""`make endurance`: runs many short jobs, checks that each is answered once, and measures the growth of memory.

Prints a JSON object. The exit code is 1 if a job was lost or answered twice, or if memory grew by more than 20 MB.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import requests

from bench.servers import Server, worker

WARM_UP = 500
ALLOWED_GROWTH_MB = 20.0


def main(arguments: list[str]) -> int:
    """Run the jobs and print the results."""
    parser = argparse.ArgumentParser(prog="python -m bench.endurance", description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=32)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, worker("worker", Path(folder) / "worker.log") as server:
        asyncio.run(run(server, WARM_UP, options.concurrency))
        before, started = server.memory_mb(), time.monotonic()
        completed = asyncio.run(run(server, options.jobs, options.concurrency))
        growth, seconds = server.memory_mb() - before, time.monotonic() - started
        records = requests.get(f"{server.endpoint_url}/records", timeout=10).json()
    duplicates = records["duplicate_dones"] + records["late_streams"]
    result = {
        "jobs": options.jobs,
        "completed": completed,
        "answered twice or too late": duplicates,
        "jobs/s": round(options.jobs / seconds, 1),
        "memory after the first 500 jobs, MB": round(before, 1),
        "growth of memory, MB": round(growth, 1),
    }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return int(completed != options.jobs or duplicates > 0 or growth > ALLOWED_GROWTH_MB)


async def run(server: Server, jobs: int, concurrency: int) -> int:
    """Send `jobs` jobs and return how many were completed with an output."""
    numbers = iter(range(jobs))
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def client() -> int:
            return sum([await _job(session, server.endpoint_url, number) for number in numbers])

        return sum(await asyncio.gather(*(client() for _ in range(concurrency))))


async def _job(session: aiohttp.ClientSession, url: str, number: int) -> bool:
    job_input = {"prompt": f"Once {number}", "max_tokens": 2, "ignore_eos": True, "stream": number % 2 == 0}
    async with session.post(f"{url}/runsync", json={"input": job_input}) as response:
        result = await response.json()
    return bool(result["status"] == "COMPLETED" and result["output"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
