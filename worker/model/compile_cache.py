"""Keeps the code that vLLM compiles on the network volume, for the workers that start later.

There is one archive for each key. It is restored before the engine starts and saved once the engine is ready. Workers
run the code in it: whoever can write to the volume decides what they run. Without a usable cache vLLM compiles again.
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

STALE_SECONDS = 3600.0
"""The age at which a temporary file counts as abandoned."""
EXCLUDED = ("assets", "modelinfos")
"""Folders of vLLM's cache without compiled code."""
BATON = "lock"
"""The name of torch's lock files (`torch.utils.file_baton`). Whoever finds one waits until it is removed."""


def key_of(about: Mapping[str, Any]) -> str:
    """Return the key for everything that compiled code depends on: versions, GPU, model, arguments."""
    text = json.dumps(about, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _is_kept(name: Path) -> bool:
    """Return whether a file belongs into the archive. `name` is relative to vLLM's cache folder."""
    return name.parts[0] not in EXCLUDED and name.name != BATON and name.suffix != ".lock"


class CompileCache:
    """The archive of one key in a `folder` of at most `max_bytes`. `local` is vLLM's cache folder."""

    def __init__(self, folder: Path, key: str, local: Path, max_bytes: int) -> None:
        self._folder = folder
        self._archive = folder / f"{key}.tar"
        self._local = local
        self._max_bytes = max_bytes
        self._saved: dict[str, int] = {}

    def restore(self) -> bool:
        """Extract the archive; return whether it could be used."""
        try:
            self._local.mkdir(parents=True, exist_ok=True)
            # Extract to a temporary folder first, so that nothing of a truncated archive is used.
            with (
                tempfile.TemporaryDirectory(dir=self._local.parent) as temporary,
                tarfile.open(self._archive, "r:") as archive,
            ):
                archive.extractall(temporary, filter="data")
                for file in filter(Path.is_file, Path(temporary).rglob("*")):
                    if not _is_kept(name := file.relative_to(temporary)):
                        continue
                    target = self._local / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    file.replace(target)
            # The modification time decides which archives are evicted.
            os.utime(self._archive)
            return True
        except FileNotFoundError:
            return False
        except (OSError, tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            log.warning("The compile cache cannot be used (%s). vLLM compiles again", type(error).__name__)
            return False
        finally:
            self._saved = self._files()

    def save(self) -> bool:
        """Write the archive if there are new files; return whether it was written."""
        try:
            files = self._files()
            if not files.items() - self._saved.items():
                return False
            self._saved = files
            if (size := sum(files.values())) > self._max_bytes:
                log.warning("The compile cache is not saved: its %.1f GB are more than COMPILE_CACHE_GB", size / 1e9)
                return False
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self._folder, suffix=".tmp")
            try:
                with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w") as archive:
                    for name in sorted(files):
                        archive.add(self._local / name, name)
                Path(temporary).replace(self._archive)
            finally:
                Path(temporary).unlink(missing_ok=True)
            self._evict()
        except (OSError, tarfile.TarError) as error:
            log.warning("The compile cache cannot be saved (%s)", type(error).__name__)
            return False
        return True

    def _files(self) -> dict[str, int]:
        """Return the size of each file to save, by its relative path."""
        files = ((path.relative_to(self._local), path) for path in self._local.rglob("*") if path.is_file())
        return {str(name): path.stat().st_size for name, path in files if _is_kept(name)}

    def _evict(self) -> None:
        """Remove abandoned temporary files, and the least recently used archives until the others fit."""
        for temporary in self._folder.glob("*.tmp"):
            if time.time() - temporary.stat().st_mtime > STALE_SECONDS:
                temporary.unlink(missing_ok=True)
        archives = [(path, path.stat()) for path in self._folder.glob("*.tar")]
        free = self._max_bytes
        for path, status in sorted(archives, key=lambda item: (item[0] != self._archive, -item[1].st_mtime)):
            free -= status.st_size
            if free < 0:
                path.unlink(missing_ok=True)
