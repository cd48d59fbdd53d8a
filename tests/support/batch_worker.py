"""A worker that runs a batch with a scripted engine, to be killed at any moment, or measured.

`python -m tests.support.batch_worker IN OUT KEY ASKED CONCURRENCY MILLISECONDS`. It appends the number of each line
that it asks to the file ASKED, and answers after up to that many milliseconds. It prints "ready" when it begins, and at
the end the growth of its memory in bytes.
"""

import asyncio
import os
import random
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.batches import LIMIT, answer
from worker.batch.journal import Journal
from worker.batch.lines import Line
from worker.batch.runner import Runner
from worker.batch.source import Source
from worker.errors import Json


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


async def work(source: Source, output: Path, key: str, asked: int, concurrency: int, milliseconds: float) -> None:
    async def ask(line: Line) -> tuple[int, Json | None]:
        os.write(asked, f"{line.number}\n".encode())
        if milliseconds:
            await asyncio.sleep(random.random() * milliseconds / 1000)
        return 200, answer(line.number)

    with ThreadPoolExecutor(4) as executor:
        journal = Journal.open(output, key)
        await Runner(ask, journal, source, lambda: concurrency, executor).run()
        journal.finish("input")


def main(source: str, output: str, key: str, asked: str, concurrency: str, milliseconds: str) -> None:
    asked_file = os.open(asked, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    before = peak_bytes()
    print("ready", flush=True)
    lines = Source.from_file(Path(source), LIMIT)
    asyncio.run(work(lines, Path(output), key, asked_file, int(concurrency), float(milliseconds)))
    print(peak_bytes() - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
