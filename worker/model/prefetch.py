"""`python -m worker.model.prefetch FILE…`: reads weights into the page cache while the worker imports vLLM."""

import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

CHUNK_BYTES = 16 << 20
THREADS = 4
MEMORY_SHARE = 0.6
"""The share of free memory that the page cache may take."""
CGROUP = Path("/sys/fs/cgroup")
LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Files with a container's memory limit and usage, in versions 2 and 1 of control groups."""


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


def free_memory(cgroup: Path = CGROUP, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Return the bytes of memory that the container may still use: the machine's, or less if it has a limit."""
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = 1024 * int(lines["MemAvailable"].split()[0])
    for names in LIMITS:
        with suppress(OSError, ValueError):
            limit, usage = (int((cgroup / name).read_text()) for name in names)
            return min(available, limit - usage)
    return available


def _read(file: Path) -> None:
    buffer = bytearray(CHUNK_BYTES)
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass


if __name__ == "__main__":
    main(map(Path, sys.argv[1:]))
