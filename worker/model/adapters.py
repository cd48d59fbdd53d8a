"""LoRA adapters that requests name: which are allowed, and where their files are.

`python -m worker.model.adapters NAME BYTES` downloads one of at most BYTES bytes, in a process of its own.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path

from worker import processes
from worker.errors import JobError, Json, StartupError
from worker.model import snapshots
from worker.model.adapter_checks import (
    CONFIG,
    WEIGHTS,
    AdapterError,
    AdapterNotFoundError,
    AdapterUnavailableError,
    check_size,
    disk_errors,
)
from worker.model.repositories import Repository
from worker.settings import Settings, environment, flags, read

MOST_LISTED = 1000
DOWNLOAD_SECONDS = 600.0
"""The time after which a download is ended."""
RESERVED = frozenset(("text", "image", "video", "audio", "input", "file"))
"""vLLM uses an adapter with such a name for every request that has media of this kind."""

_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)
_PICKLED = "The worker accepts safetensors only, because pickled files can run code."


def is_allowed(name: str, settings: Settings) -> bool:
    """Return whether a request may load the adapter `name`."""
    return any(fnmatchcase(name, pattern) for pattern in settings.lora_allow)


def offered(settings: Settings) -> list[str]:
    """Return the adapters that requests may load, as far as they are known: folders, and names without wildcards."""
    names = {pattern for pattern in settings.lora_allow if _NAME.fullmatch(pattern) and "/" in pattern}
    if settings.adapter_folder is not None:
        root = Path(settings.adapter_folder)
        configs = [*root.glob(f"*/{CONFIG}"), *root.glob(f"*/*/{CONFIG}")][:MOST_LISTED]
        names |= {config.parent.relative_to(root).as_posix() for config in configs}
    return sorted(name for name in names if is_allowed(name, settings) and _is_valid(name))


def _is_valid(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and name not in RESERVED


def find(name: str, settings: Settings, copies: Path, max_bytes: int) -> Path | None:
    """Return the folder of an adapter on disk; None if it must be downloaded.

    That is a copy of the folder in ADAPTER_FOLDER, or a snapshot in the caches of the Hugging Face libraries.

    Raises:
        AdapterError: `name` is no name of an adapter, or the folder in ADAPTER_FOLDER is no adapter.
        AdapterUnavailableError: the folder in ADAPTER_FOLDER cannot be copied.
    """
    if not _is_valid(name):
        raise AdapterNotFoundError.of(name)
    if settings.adapter_folder is not None:
        root = Path(settings.adapter_folder)
        folder = Path(os.path.realpath(root / name))
        with disk_errors(name, "copy"):
            # A link must not lead out of ADAPTER_FOLDER.
            if folder.is_dir() and folder.is_relative_to(os.path.realpath(root)):
                return _copy(folder, copies, name, max_bytes)
    if "/" not in name:
        raise AdapterNotFoundError.of(name)
    return snapshots.find(_repository(name), snapshots.caches(settings))


def _repository(name: str, max_bytes: int | None = None) -> Repository:
    return Repository(name, required=((CONFIG,), (WEIGHTS,)), files=(CONFIG, WEIGHTS), max_bytes=max_bytes)


class Downloads:
    """Downloads adapters, each in a process of its own."""

    def __init__(self, settings: Settings, seconds: float = DOWNLOAD_SECONDS) -> None:
        self._environ = settings.variables.values
        self._seconds = seconds
        self._processes: set[subprocess.Popen[str]] = set()
        self._is_closed = False

    def close(self) -> None:
        """End all downloads, also those that are about to start in other threads."""
        self._is_closed = True
        for process in tuple(self._processes):
            process.kill()

    def get(self, name: str, max_bytes: int) -> Path:
        """Download an adapter, and return its folder.

        Raises:
            AdapterNotFoundError: the Hub has no such repository, or the worker has no access to it.
            AdapterError: the repository has no adapter that the worker accepts.
            AdapterUnavailableError: the Hub cannot be reached, is too slow or refuses HF_TOKEN, or the disk is full.
        """
        if flags.boolean(self._environ, "HF_HUB_OFFLINE"):
            raise AdapterNotFoundError(
                f"The LoRA adapter {name!r} is in no local cache, and HF_HUB_OFFLINE forbids to download it."
            )
        try:
            result: Json = json.loads(self._output(name, max_bytes))
        except ValueError:
            raise AdapterUnavailableError(
                f"The download of the LoRA adapter {name!r} ended early. The worker's log shows why."
            ) from None
        if "folder" in result:
            return Path(result["folder"])
        errors: dict[int, type[JobError]] = {400: AdapterError, 404: AdapterNotFoundError}
        raise errors.get(result["status"], AdapterUnavailableError)(result["error"])

    def _output(self, name: str, max_bytes: int) -> str:
        """Return what the process prints."""
        arguments = (name, str(max_bytes))
        with processes.start(
            "worker.model.adapters", *arguments, environ=self._environ, stdout=subprocess.PIPE, text=True
        ) as process:
            self._processes.add(process)
            try:
                if self._is_closed:
                    process.kill()
                output: str = process.communicate(timeout=self._seconds)[0]
            except subprocess.TimeoutExpired:
                raise AdapterUnavailableError(
                    f"The download of the LoRA adapter {name!r} did not end within {self._seconds:g} s. "
                    "Try again later."
                ) from None
            finally:
                process.kill()
                self._processes.discard(process)
        return output


def main(name: str, max_bytes: int) -> None:
    """Download an adapter, and print its folder, or `error` and `status`, as a JSON object."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from worker.model.download import NoSuchRepositoryError, UnusableRepositoryError, download

    # They would be in the middle of the worker's log lines.
    disable_progress_bars()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    try:
        result: Json = {"folder": str(download(_repository(name, max_bytes), read(environment.read())))}
    except UnusableRepositoryError as error:
        result = {"status": 400, "error": str(error)}
    except NoSuchRepositoryError as error:
        result = {"status": 404, "error": str(error)}
    except StartupError as error:
        result = {"status": 503, "error": str(error)}
    sys.stdout.write(json.dumps(result) + "\n")


def _copy(folder: Path, copies: Path, name: str, max_bytes: int) -> Path:
    """Copy an adapter to a folder in `copies` that is named after `name` and the content, and return that folder.

    The engine reads the copy, which nobody changes. vLLM's prefix cache distinguishes adapters by name and folder.

    Raises:
        AdapterError: a file is missing, too large, or a link out of the folder.
    """
    for file in (CONFIG, WEIGHTS):
        path = folder / file
        if not path.is_file():
            raise AdapterError(f"The LoRA adapter {name!r} has no file {file}. {_PICKLED}")
        if not Path(os.path.realpath(path)).is_relative_to(folder):
            raise AdapterError(f"The LoRA adapter {name!r}: {file} is a link that leads out of its folder.")
        check_size(path, name, max_bytes)
    partial = Path(tempfile.mkdtemp(dir=copies))
    digest = hashlib.sha256(name.encode())
    try:
        for file in (CONFIG, WEIGHTS):
            shutil.copyfile(folder / file, partial / file)
            with (partial / file).open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        target = copies / digest.hexdigest()[:32]
        if not target.is_dir():
            partial.rename(target)
        return target
    finally:
        shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
