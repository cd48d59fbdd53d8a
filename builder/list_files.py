"""Lists the files that a start of the worker reads, for `worker/readahead.py`. Of libraries it lists the parts in use.

Runs while the image is built and needs no GPU. A start with another list, or without one, is only slower.
"""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from struct import iter_unpack

from worker import readahead

MODULES = (
    "worker.main",
    "worker.engine",
    "vllm.v1.engine.core",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.model_executor.model_loader",
    "worker.queue.sdk",
)
"""What the worker and its engine process import, in this order."""
PAGE = 4096
GAP = 16 * PAGE
"""Parts of a file with less than that between them become one."""
PRESENT = 1 << 63


def main() -> int:
    """Import everything, and write the list."""
    opened: dict[str, None] = {}

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str):
            opened.setdefault(arguments[0])

    sys.addaudithook(note)
    for module in MODULES:
        try:
            import_module(module)
        except Exception as error:  # noqa: BLE001 - a module may need a GPU
            sys.stdout.write(f"Not imported: {module} ({type(error).__name__})\n")
    lines = [*_parts_of_libraries(), *(f"0 0 {path}" for path in opened if _exists(path))]
    readahead.LIST.write_text("".join(f"{line}\n" for line in lines))
    size = sum(int(line.split()[1]) or Path(line.split(" ", 2)[2]).stat().st_size for line in lines)
    sys.stdout.write(f"{len(lines)} parts of files with {size / 1e6:.0f} MB in {readahead.LIST}\n")
    return 0


def _exists(path: str) -> bool:
    """Return whether this is a file on a disk that later starts have too."""
    return path.startswith("/") and not path.startswith(("/proc/", "/sys/", "/dev/")) and Path(path).is_file()


def _parts_of_libraries() -> Iterator[str]:
    """Yield the parts of mapped files that are in this process's memory. Some sandboxes do not tell this."""
    if not Path("/proc/self/pagemap").exists():
        return
    parts: dict[str, list[list[int]]] = {}
    with Path("/proc/self/maps").open() as maps, Path("/proc/self/pagemap").open("rb") as pages:
        for line in maps:
            addresses, _, offset, _, _, *path = line.split(None, 5)
            if not path or not _exists(name := path[0].rstrip("\n")):
                continue
            first, last = (int(address, 16) for address in addresses.split("-"))
            pages.seek(first // PAGE * 8)
            for number, (page,) in enumerate(iter_unpack("Q", pages.read((last - first) // PAGE * 8))):
                if page & PRESENT:
                    _add(parts.setdefault(name, []), int(offset, 16) + number * PAGE)
    for name, each in parts.items():
        yield from (f"{start} {end - start} {name}" for start, end in each)


def _add(parts: list[list[int]], page: int) -> None:
    """Add a page to the parts, each with its start and its end."""
    if parts and parts[-1][0] <= page <= parts[-1][1] + GAP:
        parts[-1][1] = max(parts[-1][1], page + PAGE)
    else:
        parts.append([page, page + PAGE])


if __name__ == "__main__":
    sys.exit(main())
