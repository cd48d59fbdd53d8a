"""Warnings about a container with too little disk, memory or shared memory."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.model.test_snapshots import write
from worker.model import preflight
from worker.model.prefetch import free_memory


def test_no_warning_without_a_shortage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "free_memory", lambda: 64 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 << 30))
    assert list(preflight.warnings(tmp_path / "cache", 8)) == []


def test_a_warning_for_each_shortage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "free_memory", lambda: 1 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 << 20))
    (tmp_path / "file").write_text("not a folder")
    warnings = list(preflight.warnings(tmp_path / "file" / "cache", 2, tmp_path))
    assert len(warnings) == 4
    assert "VLLM_CACHE_ROOT" in warnings[0]
    assert len(list(preflight.warnings(tmp_path / "cache", 1, tmp_path))) == 2


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
