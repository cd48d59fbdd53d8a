"""`python -m worker.model.download [NAME…]`: downloads repositories that the settings name, or all of them.

Prints a JSON object with the folder of each name, or with `error` and `exit_code`.
"""

import errno
import fnmatch
import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import errors, snapshot_download
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import disable_progress_bars

from worker import redaction
from worker.backoff import Backoff
from worker.errors import ConfigurationError, StartupError
from worker.model import repositories, snapshots
from worker.model.preflight import free_disk
from worker.model.repositories import FORMATS, GGUF, NO_GGUF, Repository, weight_files
from worker.settings import Settings, environment, read

log = logging.getLogger(__name__)

NOT_NEEDED = ["*.msgpack", "*.h5", "*.ot", "*.onnx", "*.pth", "original/*", "*.md", ".gitattributes"]
"""Files that vLLM never loads."""
REVISION_VARIABLES = {"MODEL_NAME": "MODEL_REVISION", "TOKENIZER": "TOKENIZER_REVISION"}
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
"""Errors of a folder that belongs to another user, is read-only, or is a file."""
ATTEMPTS = 3
SPARE_BYTES = 1 << 30
"""Disk space that stays free after a download."""


def main(names: Collection[str]) -> int:
    """Download repositories and print the result; return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    exit_code = 0
    try:
        settings = read(environment.read())
        needed = (repositories.model(settings), *repositories.others(settings))
        chosen = [repository for repository in needed if not names or repository.value in names]
        result: dict[str, Any] = {repository.value: str(download(repository, settings)) for repository in chosen}
    except StartupError as error:
        exit_code = error.exit_code
        result = {"error": str(error), "exit_code": exit_code}
    sys.stdout.write(json.dumps(result) + "\n")
    return exit_code


def download(repository: Repository, settings: Settings) -> Path:
    """Download a repository, or the part of it that is needed, to the first writable cache; return its folder or file.

    Raises:
        ConfigurationError: the name, the revision or the token is wrong.
        StartupError: the Hub cannot be reached, the disk is full, or no cache is writable.
    """
    for cache in snapshots.download_folders(settings):
        try:
            return _download_to(cache, repository, settings)
        except _NotWritableError as error:
            log.warning("The model cache %s is not writable (%s). The worker uses another folder", cache, error)
    try:
        return _download_to(_temporary_cache(), repository, settings)
    except (_NotWritableError, OSError) as error:
        raise StartupError(f"No folder for {repository.name} is writable ({error}). Set DOWNLOAD_DIR to one.") from None


def _temporary_cache() -> Path:
    """Return a cache that only this user can write to. Every process of the user gets the same one."""
    cache = Path(tempfile.gettempdir(), f"vllm-worker-{os.getuid()}")
    cache.mkdir(mode=0o700, exist_ok=True)
    if cache.lstat().st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "It belongs to another user", str(cache))
    return cache


class NoSuchRepositoryError(ConfigurationError):
    """The Hub has no such repository, or the worker has no access to it."""


class UnusableRepositoryError(ConfigurationError):
    """The repository lacks a file that is needed, or is too large."""


class _NotWritableError(Exception):
    """Why a cache is not writable."""


def _download_to(cache: Path, repository: Repository, settings: Settings) -> Path:
    """Download a repository to a cache. Try again after errors that may pass."""
    backoff = Backoff(first=1.0, most=10.0)
    attempts_left = ATTEMPTS
    while True:
        attempts_left -= 1
        try:
            return _download(cache, repository, settings)
        except (ValueError, OSError, httpx2.HTTPError) as error:
            cause = error.__cause__ if isinstance(error, errors.DryRunError) and error.__cause__ else error
            if permanent := _permanent(cause, repository):
                raise permanent from None
            if isinstance(cause, OSError) and cause.errno in NOT_WRITABLE:
                raise _NotWritableError(f"{cause.strerror}: {cause.filename}") from error
            if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
                place = cause.filename or cache
                raise StartupError(f"{repository.name} cannot be downloaded: {cause.strerror}: {place}") from error
            if not attempts_left:
                raise StartupError(
                    f"{repository.label} is in no local cache and could not be fetched from the Hugging Face "
                    f"Hub: {type(cause).__name__}. {_advice(repository)}"
                ) from error
            log.warning("The download failed (%s). Trying again", type(cause).__name__)
            time.sleep(backoff.next())


def _download(cache: Path, repository: Repository, settings: Settings) -> Path:
    path = repository.path
    fetch = partial(
        snapshot_download,
        repository.name,
        revision=repository.revision,
        token=settings.hf_token,
        cache_dir=cache,
        allow_patterns=repository.files or (None if path is None else path if repository.is_file else f"{path}/*"),
    )
    files: Any = fetch(dry_run=True, ignore_patterns=NOT_NEEDED)
    _check_files({file.filename: file.file_size for file in files}, repository)
    if not files:
        place = f"nothing at {path!r}" if path else "no files"
        raise ConfigurationError(f"{repository.label}: the repository has {place}. Correct the name or the path.")
    extra = dict(redaction.flag_values(settings.vllm_extra_args))
    config_format = extra.get("--config-format") or settings.variables.values.get("CONFIG_FORMAT", "auto")
    ignored = _ignored({file.filename for file in files}, repository, config_format)
    needed = filter_repo_objects(files, ignore_patterns=ignored, key=lambda file: file.filename)
    missing = sum(file.file_size for file in needed if file.will_download)
    snapshot = Path(files[0].local_path).parents[len(Path(files[0].filename).parts) - 1]
    log.info("Downloading %s, %.1f GB, from the Hugging Face Hub into %s", repository.name, missing / 1e9, snapshot)
    _check_disk(snapshot, missing)
    marker = snapshots.marker(snapshot)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()
    with _progress(snapshot.parent.parent, missing):
        folder = Path(fetch(ignore_patterns=ignored)) / (path or "")
    marker.unlink(missing_ok=True)
    return folder


def _check_files(sizes: Mapping[str, int], repository: Repository) -> None:
    """Check that a repository has the files that are needed of it, and that they are not too large."""
    if missing := set(repository.files or ()) - sizes.keys():
        raise UnusableRepositoryError(f"{repository.label}: the repository has no {', '.join(sorted(missing))}.")
    if repository.max_bytes is not None and (size := sum(sizes.values())) > repository.max_bytes:
        raise UnusableRepositoryError(
            f"{repository.label}: its files have {size} bytes; at most {repository.max_bytes} are accepted."
        )


def _ignored(names: Collection[str], repository: Repository, config_format: str) -> list[str]:
    """Return patterns of the files not to download, given the names of all files and vLLM's `--config-format`."""
    weights = weight_files(names) if repository.has_weights else []
    suffix = next((suffix for suffix in FORMATS if weights and weights[0].endswith(suffix)), None)
    if suffix == GGUF and not repository.is_file:
        raise ConfigurationError(f"{repository.label} has only GGUF files. {NO_GGUF}")
    ignored = [*NOT_NEEDED, *(f"*{each}" for each in FORMATS if each != suffix)]
    if fnmatch.filter(names, "model*.safetensors") and fnmatch.filter(names, "consolidated*.safetensors"):
        # Mistral's repositories have two copies of the weights. vLLM loads the one in Mistral's format if it has its
        # configuration too (vllm/transformers_utils/config.py).
        is_mistrals = "params.json" in names and config_format != "hf"
        ignored.append("model*.safetensors*" if is_mistrals else "consolidated*")
    return ignored


def _advice(repository: Repository) -> str:
    """Return what to do if the Hub cannot be reached."""
    if repository.files:
        return "Try again later."
    return f"Check the network, or set {repository.variable} to a local folder."


def _permanent(error: BaseException, repository: Repository) -> ConfigurationError | None:
    """Return an error for one of the Hub's that another attempt cannot fix; None for others."""
    name, label = repository.name, repository.label
    match error:
        case errors.HFValidationError():
            return NoSuchRepositoryError(f"{label}: neither a folder nor a Hugging Face id (ORG/NAME).")
        case errors.GatedRepoError():
            return NoSuchRepositoryError(
                f"{label} is gated: ask for access at https://huggingface.co/{name} and set HF_TOKEN to a token of "
                "an account that has it."
            )
        case errors.RevisionNotFoundError():
            variable = REVISION_VARIABLES.get(repository.variable, repository.variable)
            subject = f"{variable}={repository.revision!r}" if repository.revision else label
            return NoSuchRepositoryError(f"{subject}: {name} has no such branch, tag or commit.")
        case errors.RepositoryNotFoundError():
            if not repository.variable:
                return NoSuchRepositoryError(
                    f"The Hugging Face Hub has no LoRA adapter {name!r}, or it is private. Check the spelling. "
                    "For a private adapter, set HF_TOKEN."
                )
            return NoSuchRepositoryError(
                f"{label}: the Hugging Face Hub has no such model, or it is private. Check the spelling. "
                "For a private model, set HF_TOKEN."
            )
        case errors.HfHubHTTPError() if error.response is not None and error.response.status_code in (401, 403):
            return ConfigurationError(
                f"HF_TOKEN: the Hugging Face Hub refuses it. Create a token with read access to {name}, or unset it."
            )
    return None


def _check_disk(folder: Path, size: int) -> None:
    """Check that `size` bytes fit on the disk of a folder, which may not exist yet."""
    existing, free = free_disk(folder)
    if size + SPARE_BYTES > free:
        raise StartupError(
            f"The download needs {size / 1e9:.1f} GB and {SPARE_BYTES / 1e9:.1f} GB to spare, but the disk of "
            f"{existing} has {free / 1e9:.1f} GB free. Give the container a larger disk, or use a network volume."
        )


@contextmanager
def _progress(cache: Path, size: int, every: float = 1.0) -> Iterator[None]:
    """Log every tenth of a download of `size` bytes; on a terminal, leave it to the progress bars of the Hub's library.

    `cache` is the repository's folder in the cache, `every` the seconds between two looks at it.
    """
    if sys.stderr.isatty() or not size:
        yield
        return
    disable_progress_bars()
    done = threading.Event()

    def on_disk() -> int:
        return sum(file.stat().st_size for file in (cache / "blobs").glob("*"))

    def log_tenths(before: int) -> None:
        logged = 0
        while not done.wait(every):
            try:
                tenths = 10 * (on_disk() - before) // size
            except OSError:
                # The Hub's library renames files when they are complete.
                continue
            if logged < tenths <= 10:
                logged = tenths
                log.info("Downloaded %d %% of %.1f GB", 10 * tenths, size / 1e9)

    thread = threading.Thread(target=log_tenths, args=(on_disk(),), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
