"""`python -m worker.model.prefetch FILE…`: reads weights into the page cache while the worker imports vLLM."""

import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from worker.memory import free_memory

CHUNK_BYTES = 16 << 20
THREADS = 4
MEMORY_SHARE = 0.6
"""The share of free memory that the page cache may take."""


def main(files: Iterable[Path]) -> None:
    """Read the first of the files that fit into memory together."""
    budget = int(MEMORY_SHARE * free_memory())
    fitting = []
    for file in files:
        budget -= file.stat().st_size
        if budget < 0:
            break
        fitting.append(file)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(_read, fitting))


def _read(file: Path) -> None:
    buffer = bytearray(CHUNK_BYTES)
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass


if __name__ == "__main__":
    main(map(Path, sys.argv[1:]))
