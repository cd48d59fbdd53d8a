"""Warnings about a container with too little disk, memory or shared memory."""

from pathlib import Path

import pytest

from tests.model.test_snapshots import write
from worker.memory import free_memory
from worker.model import preflight

FULL = Path("/proc")
"""A folder that is not writable and whose file system has no free space."""


def test_no_warning_without_a_shortage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "free_memory", lambda: 64 << 30)
    assert list(preflight.warnings(tmp_path / "cache", 8, tmp_path)) == []


def test_each_shortage_has_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "free_memory", lambda: 1 << 30)
    not_writable, disk, memory, shared = preflight.warnings(FULL / "cache", 2, FULL)
    assert "VLLM_CACHE_ROOT" in not_writable
    assert "The disk of /proc has only 0.0 GB free" in disk
    assert "only 1.1 GB of free memory" in memory
    assert "--shm-size" in shared
    # One GPU needs no shared memory.
    assert list(preflight.warnings(FULL / "cache", 1, FULL)) == [not_writable, disk, memory]
    assert list(preflight.warnings(tmp_path / "cache", 1, FULL)) == [memory]


@pytest.mark.parametrize(("limit", "free"), [("max", 8 << 30), (str(3 << 30), 2 << 30), (str(20 << 30), 8 << 30)])
def test_free_memory_is_the_smaller_of_container_and_machine(tmp_path: Path, limit: str, free: int) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{1 << 30}\n")
    (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {8 << 20} kB\n")
    assert free_memory(tmp_path, tmp_path / "meminfo") == free
    (tmp_path / "memory.max").unlink()
    write(tmp_path / "memory", {"memory.limit_in_bytes": b"3000000000", "memory.usage_in_bytes": b"1000000000"})
    assert free_memory(tmp_path, tmp_path / "meminfo") == 2_000_000_000
    assert free_memory(tmp_path / "no such cgroup", tmp_path / "meminfo") == 8 << 30
