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
from worker.errors import ConfigurationError, JobError, Json, StartupError
from worker.model import snapshots
from worker.model.adapter_checks import (
    CONFIG,
    MAX_CONFIG_BYTES,
    WEIGHTS,
    AdapterError,
    AdapterNotFoundError,
    AdapterUnavailableError,
    check_size,
)
from worker.model.repositories import Repository
from worker.settings import Settings, environment, read

MOST_LISTED = 1000
MOST_COPIES = 16
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
    """
    if not _is_valid(name):
        raise AdapterNotFoundError.of(name)
    if settings.adapter_folder is not None:
        root = Path(settings.adapter_folder)
        folder = Path(os.path.realpath(root / name))
        # A link must not lead out of ADAPTER_FOLDER.
        if folder.is_dir() and folder.is_relative_to(os.path.realpath(root)):
            return _copy(folder, copies, name, max_bytes)
    if "/" not in name:
        raise AdapterNotFoundError.of(name)
    return snapshots.find(_repository(name), snapshots.caches(settings))


def _repository(name: str, max_bytes: int | None = None) -> Repository:
    return Repository(name, "model", required=((CONFIG,), (WEIGHTS,)), files=(CONFIG, WEIGHTS), max_bytes=max_bytes)


def download(name: str, settings: Settings, max_bytes: int) -> Path:
    """Download an adapter in a process of its own, and return its folder.

    Raises:
        AdapterNotFoundError: the Hub has no such repository, or the worker has no access to it.
        AdapterError: the repository has no adapter that the worker accepts.
        AdapterUnavailableError: the Hub cannot be reached, or the disk is full.
    """
    variables = settings.variables.values
    if variables.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise AdapterNotFoundError(
            f"The LoRA adapter {name!r} is in no local cache, and HF_HUB_OFFLINE forbids to download it."
        )
    arguments = (name, str(max_bytes))
    with processes.start(
        "worker.model.adapters", *arguments, environ=variables, stdout=subprocess.PIPE, text=True
    ) as process:
        output, _ = process.communicate()
    try:
        result: Json = json.loads(output)
    except ValueError:
        raise AdapterUnavailableError(f"The download of {name!r} ended early. The worker's log shows why.") from None
    if "folder" in result:
        return Path(result["folder"])
    error: type[JobError] = {400: AdapterError, 404: AdapterNotFoundError}.get(
        result["status"], AdapterUnavailableError
    )
    raise error(result["error"])


def main(name: str, max_bytes: int) -> None:
    """Download an adapter, and print its folder, or `error` and `status`, as a JSON object."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from worker.model.download import UnusableRepositoryError
    from worker.model.download import download as fetch

    # They would be in the middle of the worker's log lines.
    disable_progress_bars()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    try:
        result: Json = {"folder": str(fetch(_repository(name, max_bytes), read(environment.read())))}
    except UnusableRepositoryError as error:
        result = {"status": 400, "error": str(error)}
    except ConfigurationError as error:
        result = {"status": 404, "error": str(error)}
    except StartupError as error:
        result = {"status": 503, "error": str(error)}
    sys.stdout.write(json.dumps(result) + "\n")


def _copy(folder: Path, copies: Path, name: str, max_bytes: int) -> Path:
    """Copy an adapter to a folder in `copies` that is named after the content, and return that folder.

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
        check_size(path, name, MAX_CONFIG_BYTES if file == CONFIG else max_bytes)
    partial = Path(tempfile.mkdtemp(dir=copies))
    digest = hashlib.sha256()
    try:
        for file in (CONFIG, WEIGHTS):
            shutil.copyfile(folder / file, partial / file)
            with (partial / file).open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        target = copies / digest.hexdigest()[:32]
        if not target.is_dir():
            partial.rename(target)
        os.utime(target)
        _remove_old(copies)
        return target
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_old(copies: Path) -> None:
    """Remove all but the last copies. The engine does not need the files of an adapter that it has loaded."""
    by_age = sorted(filter(Path.is_dir, copies.iterdir()), key=lambda folder: folder.stat().st_mtime)
    for folder in by_age[:-MOST_COPIES]:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
