"""MODEL_NAME becomes a local folder: one that is there, or a download.

Downloading is done by a process of its own (`python -m worker.model.weights`), which starts before vLLM is imported.
"""

import errno
import fnmatch
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from worker import config, program, sources
from worker.backoff import Backoff
from worker.config import Settings
from worker.errors import ConfigurationError, StartupError
from worker.model import snapshots
from worker.model.preflight import free_disk

log = logging.getLogger(__name__)

NOT_NEEDED = ["*.msgpack", "*.h5", "*.ot", "*.onnx", "original/*", "*.md", ".gitattributes"]
"""Files of a repository that vLLM never loads where there are safetensors."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
TRIES = 3
PROGRESS_SECONDS = 1.0
SPARE_BYTES = 1 << 30
"""What stays free of a disk beside the model."""


def local(settings: Settings, environ: Mapping[str, str]) -> Path | None:
    """Return the folder of the model if it is on disk, complete; None if it has to be downloaded.

    Raises:
        ConfigurationError: the name is none.
    """
    name = settings.model_name
    if (path := Path(name)).is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path.resolve()
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ConfigurationError(f"MODEL_NAME={name!r}: no such folder. Give a folder or a Hugging Face id (ORG/NAME).")
    return snapshots.find(settings, snapshots.caches(settings, environ))


class Weights:
    """A model's folder, which is there, or will be once a process of its own has downloaded it.

    What is there is read into the page cache meanwhile.
    """

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        self._folder = local(settings, environ)
        if self._folder is None:
            module, arguments = "worker.model.weights", []
        else:
            module, arguments = "worker.model.prefetch", [str(self._folder)]
        self._process = program.start(module, *arguments, environ=environ, stdout=subprocess.PIPE, text=True)

    @property
    def are_local(self) -> bool:
        """Whether nothing has to be asked of the Hub."""
        return self._folder is not None

    def folder(self) -> Path:
        """Return the folder, waiting for its download.

        Raises:
            ConfigurationError: the name, the revision or the access is wrong.
            StartupError: the Hub cannot be reached, or the disk is full.
        """
        if self._folder is not None:
            return self._folder
        told, _ = self._process.communicate()
        try:
            result = json.loads(told)
        except ValueError:
            raise StartupError(f"The download ended with {self._process.returncode}; the log says why.") from None
        if "folder" in result:
            return Path(result["folder"])
        wrong = ConfigurationError if result["exit_code"] == ConfigurationError.exit_code else StartupError
        raise wrong(result["error"])

    def close(self) -> None:
        """End what still runs."""
        self._process.kill()
        self._process.communicate()


def main() -> int:
    """Download what the environment names; print the folder, or the error, as JSON."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    said = sources.gather(os.environ)
    try:
        folder = download(config.load(said.values), said.values)
    except StartupError as error:
        sys.stdout.write(json.dumps({"error": str(error), "exit_code": error.exit_code}))
        return error.exit_code
    sys.stdout.write(json.dumps({"folder": str(folder)}))
    return 0


def download(settings: Settings, environ: Mapping[str, str]) -> Path:
    """Download the model; return its folder.

    Raises:
        ConfigurationError: the name, the revision or the access is wrong.
        StartupError: the Hub cannot be reached, or the disk is full.
    """
    # Takes half a second, which a model that is there need not wait for.
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        DryRunError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = settings.model_name
    fetch = partial(
        snapshot_download,
        name,
        revision=settings.model_revision,
        token=settings.hf_token,
        cache_dir=snapshots.download_folder(settings, environ),
        allow_patterns=[f"{settings.model_subfolder}/*"] if settings.model_subfolder else None,
    )
    backoff = Backoff(first=1.0, most=10.0)
    for last in (*[False] * (TRIES - 1), True):
        try:
            files: Any = fetch(dry_run=True, ignore_patterns=NOT_NEEDED)
            ignored = _not_needed({file.filename for file in files})
            missing = sum(
                file.file_size for file in files if file.will_download and not _is_any(file.filename, ignored)
            )
            snapshot = _snapshot_of(files)
            log.info("Downloading %s, %.1f GB, from the Hugging Face Hub into %s", name, missing / 1e9, snapshot)
            _check_disk(snapshot, missing)
            marker = snapshots.marker(snapshot)
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
            with _progress(snapshot.parent.parent, missing):
                folder = Path(fetch(ignore_patterns=ignored)) / (settings.model_subfolder or "")
            marker.unlink(missing_ok=True)
            return folder
        except (HFValidationError, DryRunError, OSError, httpx2.HTTPError) as error:
            cause = error.__cause__ if isinstance(error, DryRunError) and error.__cause__ else error
            if isinstance(cause, (HFValidationError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError)):
                raise ConfigurationError(_explained(cause, settings)) from None
            if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
                raise StartupError(f"{name} cannot be downloaded: {cause.strerror}: {cause.filename}") from error
            if last:
                raise StartupError(
                    f"MODEL_NAME={name!r} is in no local cache and could not be fetched from the Hugging Face Hub: "
                    f"{type(cause).__name__}. Check the network, or give a local folder."
                ) from error
            log.warning("Downloading failed (%s); trying again", type(cause).__name__)
            time.sleep(backoff.next())
    raise AssertionError("unreachable")


def _not_needed(names: set[str]) -> list[str]:
    """Return patterns of what is not to be downloaded: of weights in several formats, vLLM loads one."""
    ignored = list(NOT_NEEDED)
    if any(name.endswith(".safetensors") for name in names):
        ignored += ["*.bin", "*.pt", "*.pth"]
    if any(fnmatch.fnmatchcase(name, "model*.safetensors") for name in names):
        ignored.append("consolidated*")
    return ignored


def _is_any(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _snapshot_of(files: Any) -> Path:
    """Return the folder of a snapshot, of which a file's path is known."""
    if not files:
        raise ConfigurationError("MODEL_NAME or MODEL_SUBFOLDER: there is nothing to download.")
    path, name = Path(files[0].local_path), Path(files[0].filename)
    return path.parents[len(name.parts) - 1]


def _explained(error: BaseException, settings: Settings) -> str:
    """Return what is wrong and what to do, for an error of the Hub that no other try mends."""
    name, revision = settings.model_name, settings.model_revision
    match type(error).__name__:
        case "HFValidationError":
            return f"MODEL_NAME={name!r}: neither a folder nor a Hugging Face id (ORG/NAME)."
        case "GatedRepoError":
            return (
                f"MODEL_NAME={name!r} is gated: ask for access at https://huggingface.co/{name} and set HF_TOKEN "
                "to a token of an account that has it."
            )
        case "RevisionNotFoundError":
            return f"MODEL_REVISION={revision!r}: {name} has no such branch, tag or commit."
    return (
        f"MODEL_NAME={name!r}: the Hugging Face Hub has no such model, or it is private. Check the spelling; "
        "for a private model set HF_TOKEN."
    )


def _check_disk(cache: Path, missing: int) -> None:
    """Compare what is to come with what is free.

    Raises:
        StartupError: there is too little.
    """
    existing, free = free_disk(cache)
    if missing + SPARE_BYTES > free:
        raise StartupError(
            f"{missing / 1e9:.1f} GB are to be downloaded, and the disk of {existing} has {free / 1e9:.1f} GB free. "
            "Give the container a larger disk, or the endpoint a network volume."
        )


@contextmanager
def _progress(cache: Path, missing: int, every: float = PROGRESS_SECONDS) -> Iterator[None]:
    """Tell how far the download is: the Hub's bars on a terminal, else a line for every tenth."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if sys.stderr.isatty() or not missing:
        yield
        return
    disable_progress_bars()
    ended = threading.Event()

    def size() -> int:
        return sum(file.stat().st_size for file in (cache / "blobs").glob("*"))

    def tell(before: int) -> None:
        told = 0
        while not ended.wait(every):
            try:
                tenths = 10 * (size() - before) // missing
            except OSError:
                continue
            if told < tenths <= 10:
                told = tenths
                log.info("Downloaded %d %% of %.1f GB", 10 * tenths, missing / 1e9)

    thread = threading.Thread(target=tell, args=(size(),), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


if __name__ == "__main__":
    sys.exit(main())
