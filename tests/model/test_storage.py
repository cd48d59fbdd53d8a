"""Where files lie. The page cache and the file systems are those of this machine."""

import os
import subprocess
from pathlib import Path

import psutil
import pytest

from worker.model import storage


def written(file: Path, size: int) -> Path:
    """Write a file, and wait until the disk has it: only then can its pages leave the page cache."""
    with file.open("wb") as opened:
        opened.write(os.urandom(size))
        opened.flush()
        os.fsync(opened.fileno())
    return file


def test_a_new_file_is_in_the_page_cache_until_it_is_dropped(tmp_path: Path) -> None:
    file = written(tmp_path / "weights", 8 << 20)
    assert storage.cached_share([file]) == 1
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 4 << 20, os.POSIX_FADV_DONTNEED)
    share = storage.cached_share([file])
    if share == 1:
        pytest.skip("this file system keeps its pages, as tmpfs does")
    assert share == pytest.approx(0.5, abs=0.1)


def test_an_overlay_tells_what_is_in_the_page_cache(tmp_path: Path) -> None:
    """A model in an image lies on one."""
    lower, upper, work, merged = (tmp_path / name for name in ("lower", "upper", "work", "merged"))
    for folder in (lower, upper, work, merged):
        folder.mkdir()
    written(lower / "weights", 8 << 20)
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    command = ["mount", "-t", "overlay", "overlay", "-o", options, str(merged)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user cannot mount an overlay here")
    try:
        assert storage.cached_share([merged / "weights"]) == 1
    finally:
        subprocess.run(["umount", str(merged)], check=True)


def test_an_empty_file_counts_as_cached(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert storage.cached_share([tmp_path / "empty"]) == 1


def test_a_local_folder_is_no_network_file_system() -> None:
    local = [each.mountpoint for each in psutil.disk_partitions(all=True) if each.fstype in ("proc", "tmpfs", "sysfs")]
    assert local
    assert not any(storage.is_network(Path(folder)) for folder in local)
