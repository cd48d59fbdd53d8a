"""The compile cache on a shared volume, where any file may be damaged or missing."""

import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import filelock
import pytest

from tests.support.tiny import ROOT
from worker.model.compile_cache import CompileCache, key_of


def cache(tmp_path: Path, worker: str = "one", key: str = "key", max_bytes: int = 10**9) -> CompileCache:
    return CompileCache(tmp_path / "volume", key, tmp_path / worker, max_bytes)


def compiled(tmp_path: Path, worker: str = "one", name: str = "torch_compile_cache/a/b.so", size: int = 10) -> Path:
    file = tmp_path / worker / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(bytes(size))
    return file


def test_the_next_worker_gets_the_compiled_code_of_the_first(tmp_path: Path) -> None:
    first = cache(tmp_path)
    assert not first.restore()
    compiled(tmp_path)
    compiled(tmp_path, name="assets/picture.png")
    assert first.save()
    second = cache(tmp_path, "two")
    assert second.restore()
    assert (tmp_path / "two/torch_compile_cache/a/b.so").is_file()
    assert not (tmp_path / "two/assets").exists()
    assert not second.save()
    compiled(tmp_path, "two", "torch_compile_cache/c.so")
    assert second.save()
    assert cache(tmp_path, "three").restore()
    assert (tmp_path / "three/torch_compile_cache/c.so").is_file()


def test_a_file_with_a_new_size_is_saved(tmp_path: Path) -> None:
    compile_cache = cache(tmp_path)
    compile_cache.restore()
    compiled(tmp_path)
    assert compile_cache.save()
    assert not compile_cache.save()
    compiled(tmp_path, size=20)
    assert compile_cache.save()


def test_a_cache_above_the_limit_is_not_saved(tmp_path: Path) -> None:
    compile_cache = cache(tmp_path, max_bytes=1000)
    compile_cache.restore()
    compiled(tmp_path, size=2000)
    assert not compile_cache.save()
    assert not (tmp_path / "volume").exists()


@pytest.mark.parametrize("content", [b"", b"not an archive", b"\0" * 2000], ids=["empty", "text", "zeros"])
def test_a_damaged_archive_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume/key.tar").write_bytes(content)
    compile_cache = cache(tmp_path)
    compile_cache.restore()
    compiled(tmp_path)
    assert compile_cache.save()
    assert cache(tmp_path, "two").restore()


def test_nothing_of_a_truncated_archive_is_used(tmp_path: Path) -> None:
    compile_cache = cache(tmp_path)
    compile_cache.restore()
    compiled(tmp_path, size=100_000)
    compile_cache.save()
    archive = tmp_path / "volume/key.tar"
    os.truncate(archive, 5_000)
    assert not cache(tmp_path, "two").restore()
    assert list((tmp_path / "two").iterdir()) == []


def test_a_path_outside_the_folder_is_not_extracted(tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    with tarfile.open(tmp_path / "volume/key.tar", "w") as archive:
        archive.add(__file__, "../outside.py")
    assert not cache(tmp_path).restore()
    assert not (tmp_path / "outside.py").exists()


def test_a_volume_that_is_not_writable_causes_no_error(tmp_path: Path) -> None:
    (tmp_path / "volume").write_text("a file where a folder should be")
    compile_cache = cache(tmp_path)
    assert not compile_cache.restore()
    compiled(tmp_path)
    assert not compile_cache.save()


def test_abandoned_files_and_the_least_recently_used_archives_are_removed(tmp_path: Path) -> None:
    compiled(tmp_path, size=30_000)
    for age, key in ((3, "old"), (2, "used"), (1, "newer")):
        compile_cache = cache(tmp_path, key=key)
        compile_cache.save()
        os.utime(tmp_path / f"volume/{key}.tar", (time.time() - 100 * age,) * 2)
    (tmp_path / "volume/abandoned.tmp").write_bytes(b"x")
    os.utime(tmp_path / "volume/abandoned.tmp", (0, 0))
    assert cache(tmp_path, "two", "old").restore()
    cache(tmp_path, key="last", max_bytes=100_000).save()
    assert {file.name for file in (tmp_path / "volume").iterdir()} == {"last.tar", "old.tar"}


def test_two_workers_write_at_once_and_are_killed(tmp_path: Path) -> None:
    compiled(tmp_path, size=3_000_000)
    program = """
import sys
from pathlib import Path
from worker.model.compile_cache import CompileCache
root = Path(sys.argv[1])
while True:
    CompileCache(root / "volume", "key", root / "one", 10**9).save()
    print(".", flush=True)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    writers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.readline()
        for number in range(20):
            assert cache(tmp_path, f"reader{number}").restore()
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert cache(tmp_path, "last").restore()


def test_the_key_depends_on_values_but_not_on_their_order() -> None:
    assert key_of({"a": 1, "b": Path("/x")}) == key_of({"b": Path("/x"), "a": 1}) != key_of({"a": 2})


def test_lock_files_are_neither_archived_nor_restored(tmp_path: Path) -> None:
    first = cache(tmp_path)
    first.restore()
    locks = [compiled(tmp_path, name=f"flashinfer/kernel/{name}", size=0) for name in ("lock", "kernel.lock")]
    compiled(tmp_path, name="flashinfer/kernel/lock.so")
    assert first.save()
    with tarfile.open(tmp_path / "volume/key.tar", "a:") as archive:
        # An older worker archived them.
        for lock in locks:
            archive.add(lock, lock.relative_to(tmp_path / "one"))
    assert cache(tmp_path, "two").restore()
    assert [path.name for path in (tmp_path / "two/flashinfer/kernel").iterdir()] == ["lock.so"]


def test_a_lock_of_the_kernel_needs_no_removal(tmp_path: Path) -> None:
    """FlashInfer, Inductor and vLLM use these: the kernel frees them when their process is killed."""
    program = (
        "import sys, time, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); "
        "time.sleep(60)"
    )
    lock = tmp_path / "kernel.lock"
    with subprocess.Popen([sys.executable, "-c", program, str(lock)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(lock).acquire(timeout=0)
        holder.kill()
    assert lock.is_file()
    filelock.FileLock(lock).acquire(timeout=0).lock.release()
