"""What vLLM compiles, kept on the network volume from one worker to the next.

One archive for each key, copied in before the engine starts and out once after it is ready. What is compiled is run:
whoever can write to the volume can have workers run anything. A cache that is broken, foreign or read-only is no cache.
"""

import hashlib
import json
import logging
import os
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

SUFFIX = ".tar"
LEFT_OVER_SECONDS = 3600.0
"""After which a file that somebody was writing counts as left behind."""
NOT_KEPT = ("assets", "modelinfos")


def key_of(about: Mapping[str, Any]) -> str:
    """Return a name for whatever makes compiled code another: versions, GPU, model, arguments."""
    told = json.dumps(about, sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:32]


class CompileCache:
    """The archive of one key, in a folder of the volume that holds so many bytes at most."""

    def __init__(self, folder: Path, key: str, local: Path, max_bytes: int) -> None:
        self._folder = folder
        self._archive = folder / f"{key}{SUFFIX}"
        self._local = local
        self._max_bytes = max_bytes
        self._before: dict[str, int] = {}

    def restore(self) -> bool:
        """Copy the archive in; tell whether there was one."""
        try:
            self._local.mkdir(parents=True, exist_ok=True)
            # Elsewhere first: of an archive that is cut off nothing is used.
            with (
                tempfile.TemporaryDirectory(dir=self._local.parent) as folder,
                tarfile.open(self._archive, "r:") as archive,
            ):
                archive.extractall(folder, filter="data")
                _move(Path(folder), self._local)
            # So that the least recently used is evicted first.
            os.utime(self._archive)
            found = True
        except FileNotFoundError:
            found = False
        except (OSError, tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            log.warning("The compile cache cannot be used (%s); vLLM compiles anew", type(error).__name__)
            found = False
        self._before = self._files()
        return found

    def save(self) -> bool:
        """Copy out what there is, if there is anything new; tell whether that was done."""
        try:
            files = self._files()
            if not files.items() - self._before.items():
                return False
            self._before = files
            if (size := sum(files.values())) > self._max_bytes:
                log.warning("The compile cache is not kept: it has %.1f GB, more than COMPILE_CACHE_GB", size / 1e9)
                return False
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self._folder, suffix=".tmp")
            try:
                with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w") as archive:
                    for name in sorted(files):
                        archive.add(self._local / name, name)
                Path(temporary).replace(self._archive)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
            self._evict()
        except (OSError, tarfile.TarError) as error:
            log.warning("The compile cache cannot be kept (%s)", type(error).__name__)
            return False
        return True

    def _files(self) -> dict[str, int]:
        """Return the names of the files that are kept, and their sizes."""
        files = ((path.relative_to(self._local), path) for path in self._local.rglob("*") if path.is_file())
        return {str(name): path.stat().st_size for name, path in files if name.parts[0] not in NOT_KEPT}

    def _evict(self) -> None:
        """Remove the archives that have gone unused for longest until the rest fits, and what was left behind."""
        for temporary in self._folder.glob("*.tmp"):
            if time.time() - temporary.stat().st_mtime > LEFT_OVER_SECONDS:
                temporary.unlink(missing_ok=True)
        archives = [(path, path.stat()) for path in self._folder.glob(f"*{SUFFIX}")]
        room = self._max_bytes
        for path, status in sorted(archives, key=lambda one: (one[0] != self._archive, -one[1].st_mtime)):
            room -= status.st_size
            if room < 0:
                path.unlink(missing_ok=True)


def _move(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            moved = target / path.relative_to(source)
            moved.parent.mkdir(parents=True, exist_ok=True)
            path.replace(moved)
