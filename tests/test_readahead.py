"""The list of files that a start reads, and the process that reads them ahead."""

import ctypes
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.tiny import ROOT

PAGES = 4096
"""More than Linux reads ahead at once: 16 MB."""


def cached_pages(path: Path) -> list[bool]:
    """Return for each page of a file whether it is in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        resident = (ctypes.c_ubyte * (len(memory) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(memory)
        result = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(memory)), resident)
        del start
        assert result == 0, os.strerror(ctypes.get_errno())
        return [bool(each & 1) for each in resident]


def on_disk_only(path: Path) -> Path:
    """Write a file, and drop it from the page cache."""
    with path.open("wb") as file:
        file.write(os.urandom(PAGES * mmap.PAGESIZE))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if any(cached_pages(path)):
        pytest.skip(f"The file system of {path.parent} keeps its files in memory")
    return path


def run(files: Path) -> None:
    code = f"from pathlib import Path; from worker import readahead; readahead.start(Path({str(files)!r}))"
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=True, timeout=30)


def test_listed_files_and_parts_of_files_are_read_into_the_page_cache(tmp_path: Path) -> None:
    whole, part, other = (on_disk_only(tmp_path / name) for name in ("with a space", "part", "other"))
    files = tmp_path / "list"
    files.write_text(f"0 0 {tmp_path}/missing\n0 0 {whole}\n0 {8 * mmap.PAGESIZE} {part}\n")
    run(files)
    for _ in range(100):
        if all(cached_pages(whole)) and all(cached_pages(part)[:8]):
            break
        time.sleep(0.05)
    assert all(cached_pages(whole))
    assert all(cached_pages(part)[:8])
    assert not any(cached_pages(other))


def test_a_worker_without_the_list_starts_all_the_same(tmp_path: Path) -> None:
    run(tmp_path / "missing")


def test_the_list_names_what_a_start_imports(tmp_path: Path) -> None:
    """The whole list takes ten seconds: vLLM's modules are left out here."""
    code = f"""
import sys
from pathlib import Path
from builder import list_files
from worker import readahead
list_files.MODULES = ("worker.main", "no.such.module", "numpy")
readahead.LIST = Path({str(tmp_path / "list")!r})
sys.exit(list_files.main())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert "Not imported: no.such.module (ModuleNotFoundError)" in done.stdout
    lines = [line.split(" ", 2) for line in (tmp_path / "list").read_text().splitlines()]
    paths = {Path(path) for _, _, path in lines}
    assert all(path.is_file() for path in paths)
    assert any(path.parts[-2:] == ("__pycache__", f"main.{sys.implementation.cache_tag}.pyc") for path in paths)
    libraries = {Path(path): int(length) for _, length, path in lines if "_multiarray_umath" in path and length != "0"}
    assert libraries
    assert all(0 < length <= path.stat().st_size + mmap.PAGESIZE for path, length in libraries.items())
