"""`python -m worker.model.prefetch FOLDER`: reads weights into the page cache while the worker imports vLLM."""

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from worker.model.fit import weight_files

CHUNK_BYTES = 16 << 20
THREADS = 4
SHARE = 0.6
"""Of the memory that is free, how much may become page cache."""
CGROUP = Path("/sys/fs/cgroup")
LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Of a container and what of it is used, by the second and by the first version of control groups."""


def main(folder: Path) -> None:
    """Read the weights, as far as there is memory for them."""
    budget = int(SHARE * free_memory())
    files = []
    for file in weight_files(folder):
        budget -= file.stat().st_size
        if budget < 0:
            break
        files.append(file)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(_read, files))


def free_memory(cgroup: Path = CGROUP, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Return the bytes of memory that the machine has available, and the container may still take."""
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = 1024 * int(lines["MemAvailable"].split()[0])
    for names in LIMITS:
        with suppress(OSError, ValueError):
            limit, used = (int((cgroup / name).read_text()) for name in names)
            return min(available, limit - used)
    return available


def _read(file: Path) -> None:
    buffer = bytearray(CHUNK_BYTES)
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass


if __name__ == "__main__":
    main(Path(sys.argv[1]))
