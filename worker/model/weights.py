"""MODEL_NAME, and what else is named of the Hub, becomes a local folder: one that is there, or a download.

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
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from worker import processes as program
from worker.backoff import Backoff
from worker.errors import ConfigurationError, StartupError
from worker.model import repositories, snapshots
from worker.model.preflight import free_disk
from worker.model.repositories import GGUF, Repository
from worker.settings import settings as config
from worker.settings import sources
from worker.settings.settings import Settings

log = logging.getLogger(__name__)

NOT_NEEDED = ["*.msgpack", "*.h5", "*.ot", "*.onnx", "original/*", "*.md", ".gitattributes"]
"""Files of a repository that vLLM never loads where there are safetensors."""
ASK_THE_HUB = {"VLLM_EXTRA_ARGS", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"}
"""Variables with which something may be asked of the Hub that nobody knows beforehand."""
NO_GGUF = (
    "vLLM loads GGUF files only with a plugin, which is not installed. Choose a repository with safetensors; AWQ, GPTQ "
    "and FP8 are small ones."
)
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
    is_gguf = name.endswith(GGUF)
    if is_gguf and not any("gguf" in plugin.name for plugin in entry_points(group="vllm.general_plugins")):
        raise ConfigurationError(f"MODEL_NAME={name!r}: {NO_GGUF}")
    if (path := Path(name, settings.model_subfolder or "")).is_dir() or (is_gguf and path.is_file()):
        return path.resolve()
    if name.startswith(("/", ".", "~")) or (name.count("/") > 1 and not is_gguf):
        raise ConfigurationError(f"MODEL_NAME={name!r}: no such folder. Give a folder or a Hugging Face id (ORG/NAME).")
    return snapshots.find(repositories.model(settings, environ), snapshots.caches(settings, environ))


def found(settings: Settings, environ: Mapping[str, str]) -> dict[Repository, Path | None]:
    """Return what is needed, the model first, each with its folder; None: it has to be downloaded.

    Raises:
        ConfigurationError: the model's name is none.
    """
    model, *besides = repositories.wanted(settings, environ)
    caches = snapshots.caches(settings, environ)
    return {model: local(settings, environ), **{one: snapshots.find(one, caches) for one in besides}}


class Weights:
    """Folders that are there, or will be once a process of its own has downloaded them.

    A model that is there is read into the page cache meanwhile.
    """

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        self._found = found(settings, environ)
        model = next(iter(self._found.values()))
        self.are_local = None not in self._found.values()
        """Whether nothing has to be downloaded."""
        self.need_no_hub = (
            self.are_local
            and model is not None
            and not snapshots.asks_for_more(model)
            and not ASK_THE_HUB & environ.keys()
        )
        """Whether vLLM will not ask the Hub for anything either."""
        module, arguments = ("worker.model.prefetch", [str(model)]) if self.are_local else ("worker.model.weights", [])
        self._process = program.start(module, *arguments, environ=environ, stdout=subprocess.PIPE, text=True)

    def folders(self) -> dict[str, Path]:
        """Return the folder of each name that settings have, the model's first, waiting for downloads.

        Raises:
            ConfigurationError: a name, a revision or the access is wrong.
            StartupError: the Hub cannot be reached, or the disk is full.
        """
        there = {wanted.written: folder for wanted, folder in self._found.items() if folder is not None}
        if self.are_local:
            return there
        told, _ = self._process.communicate()
        try:
            result = json.loads(told)
        except ValueError:
            raise StartupError(f"The download ended with {self._process.returncode}; the log says why.") from None
        if "error" in result:
            wrong = ConfigurationError if result["exit_code"] == ConfigurationError.exit_code else StartupError
            raise wrong(result["error"])
        there |= {name: Path(folder) for name, folder in result.items()}
        return {wanted.written: there[wanted.written] for wanted in self._found}

    def close(self) -> None:
        """End what still runs."""
        self._process.kill()
        self._process.communicate()


def main() -> int:
    """Download what the environment names and is not there; print the folders, or the error, as JSON."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    said = sources.gather(os.environ)
    settings = config.load(said.values)
    try:
        missing = [wanted for wanted, folder in found(settings, said.values).items() if folder is None]
        folders = {wanted.written: str(download(wanted, settings, said.values)) for wanted in missing}
    except StartupError as error:
        sys.stdout.write(json.dumps({"error": str(error), "exit_code": error.exit_code}))
        return error.exit_code
    sys.stdout.write(json.dumps(folders))
    return 0


def download(wanted: Repository, settings: Settings, environ: Mapping[str, str]) -> Path:
    """Download a repository, or what is wanted of it; return its folder.

    Raises:
        ConfigurationError: the name, the revision or the access is wrong.
        StartupError: the Hub cannot be reached, or the disk is full.
    """
    # Takes half a second, which a model that is there need not wait for.
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    name, path = wanted.name, wanted.path
    fetch = partial(
        snapshot_download,
        name,
        revision=wanted.revision,
        token=settings.hf_token,
        cache_dir=snapshots.download_folder(settings, environ),
        allow_patterns=None if path is None else path if wanted.is_file else f"{path}/*",
    )
    backoff = Backoff(first=1.0, most=10.0)
    for last in (*[False] * (TRIES - 1), True):
        try:
            files: Any = fetch(dry_run=True, ignore_patterns=NOT_NEEDED)
            ignored = _not_needed({file.filename for file in files}, wanted)
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
                folder = Path(fetch(ignore_patterns=ignored)) / (path or "")
            marker.unlink(missing_ok=True)
            return folder
        except (ValueError, DryRunError, OSError, httpx2.HTTPError) as error:
            cause = error.__cause__ if isinstance(error, DryRunError) and error.__cause__ else error
            if explained := _explained(cause, wanted):
                raise ConfigurationError(explained) from None
            if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
                where = cause.filename or snapshots.download_folder(settings, environ) or "the Hub's cache"
                raise StartupError(f"{name} cannot be downloaded: {cause.strerror}: {where}") from error
            if last:
                raise StartupError(
                    f"{wanted.variable}={name!r} is in no local cache and could not be fetched from the Hugging Face "
                    f"Hub: {type(cause).__name__}. Check the network, or give a local folder."
                ) from error
            log.warning("Downloading failed (%s); trying again", type(cause).__name__)
            time.sleep(backoff.next())
    raise AssertionError("unreachable")


def _not_needed(names: set[str], wanted: Repository) -> list[str]:
    """Return patterns of what is not to be downloaded: of weights in several formats, vLLM loads one.

    Raises:
        ConfigurationError: all weights are of a format that vLLM does not load.
    """
    if not wanted.has_weights:
        return [*NOT_NEEDED, *(f"*{suffix}" for suffix in snapshots.FORMATS)]
    formats = [one for one in snapshots.FORMATS if any(name.endswith(one) for name in names)]
    if formats == [GGUF] and not wanted.is_file:
        raise ConfigurationError(f"{wanted.variable}={wanted.name!r} has GGUF files alone. {NO_GGUF}")
    ignored = list(NOT_NEEDED)
    if ".safetensors" in formats:
        ignored += ["*.bin", "*.pt", "*.pth", f"*{GGUF}"]
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


def _explained(error: BaseException, wanted: Repository) -> str | None:
    """Return what is wrong and what to do, for an error of the Hub that no other try mends."""
    from huggingface_hub import errors

    name, said = wanted.name, f"{wanted.variable}={wanted.name!r}"
    match error:
        case errors.HFValidationError():
            return f"{said}: neither a folder nor a Hugging Face id (ORG/NAME)."
        case errors.GatedRepoError():
            return (
                f"{said} is gated: ask for access at https://huggingface.co/{name} and set HF_TOKEN "
                "to a token of an account that has it."
            )
        case errors.RevisionNotFoundError():
            variable = f"{wanted.variable.partition('_')[0]}_REVISION"
            return f"{variable}={wanted.revision!r}: {name} has no such branch, tag or commit."
        case errors.RepositoryNotFoundError():
            return (
                f"{said}: the Hugging Face Hub has no such model, or it is private. Check the spelling; "
                "for a private model set HF_TOKEN."
            )
        case errors.HfHubHTTPError() if error.response is not None and error.response.status_code in (401, 403):
            return f"HF_TOKEN: the Hugging Face Hub refuses it. Make a token with read access to {name}, or unset it."
    return None


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
