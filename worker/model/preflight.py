"""Checks the container's disk, memory and shared memory before the engine starts. Creates no CUDA context."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from worker.memory import free_memory

SHARED_BYTES = 1 << 30
"""What several GPUs need of /dev/shm to communicate."""
DISK_BYTES = 1 << 30
"""What vLLM's caches may need."""
MEMORY_BYTES = 4 << 30
"""What vLLM's processes need of the container's memory, besides the model."""


def warnings(cache: Path, gpus: int, shared: Path = Path("/dev/shm")) -> Iterator[str]:  # noqa: S108 - Linux' own
    """Yield a sentence for each shortage. A worker may start in spite of them.

    `cache` is vLLM's cache folder, `shared` the folder of shared memory.
    """
    if not _is_writable(cache):
        yield f"{cache} is not writable, so compiled code is not kept. Set VLLM_CACHE_ROOT to a writable folder."
    existing, free = free_disk(cache)
    if free < DISK_BYTES:
        yield f"The disk of {existing} has only {free / 1e9:.1f} GB free. vLLM's caches may need more."
    if (memory := free_memory()) < MEMORY_BYTES:
        yield f"The container has only {memory / 1e9:.1f} GB of free memory. It may be killed during the start."
    if gpus > 1 and shared.is_dir() and (free := shutil.disk_usage(shared).free) < SHARED_BYTES:
        yield (
            f"{shared} has only {free / 1e9:.1f} GB free. Several GPUs may need more to communicate: start the "
            "container with --shm-size=8g."
        )


def free_disk(folder: Path) -> tuple[Path, int]:
    """Return the folder, or its nearest parent that exists, and the free bytes of its disk."""
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    return existing, shutil.disk_usage(existing).free


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
