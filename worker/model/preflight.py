"""What a start needs of its container, looked at before anything is loaded; without a CUDA context."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from worker.model.prefetch import free_memory

SHARED_BYTES = 1 << 30
"""What several GPUs want of /dev/shm."""
DISK_BYTES = 1 << 30
MEMORY_BYTES = 4 << 30
"""What vLLM's processes take of the container's memory, beside the model."""


def warnings(cache: Path, gpus: int, shared: Path = Path("/dev/shm")) -> Iterator[str]:  # noqa: S108 - Linux' own
    """Yield a sentence for each thing that is short; none of them alone keeps a worker from starting."""
    if not _is_writable(cache):
        yield f"{cache} cannot be written to: what vLLM compiles is not kept. VLLM_CACHE_ROOT may name another folder."
    existing, free = free_disk(cache)
    if free < DISK_BYTES:
        yield f"The disk of {existing} has only {free / 1e9:.1f} GB free; vLLM's caches may want more."
    if (memory := free_memory()) < MEMORY_BYTES:
        yield f"The container has only {memory / 1e9:.1f} GB of memory left; the start may be killed for lack of it."
    if gpus > 1 and shared.is_dir() and (free := shutil.disk_usage(shared).free) < SHARED_BYTES:
        yield f"{shared} has only {free / 1e9:.1f} GB, through which several GPUs talk to each other (--ipc=host)."


def free_disk(folder: Path) -> tuple[Path, int]:
    """Return the nearest folder that exists already, and the bytes that its disk has free."""
    existing = next(one for one in (folder, *folder.parents) if one.is_dir())
    return existing, shutil.disk_usage(existing).free


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
