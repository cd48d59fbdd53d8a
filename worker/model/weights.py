"""Turns the repositories that the settings name into local folders: searches the disk, and downloads missing ones.

A separate process downloads (`worker.model.download`), so that it starts before vLLM is imported.
"""

import json
import subprocess
from importlib.metadata import entry_points
from pathlib import Path

from worker import processes
from worker.errors import ConfigurationError, StartupError
from worker.model import repositories, snapshots
from worker.model.repositories import GGUF, NO_GGUF
from worker.settings import Settings


def locate(settings: Settings) -> dict[str, Path | None]:
    """Return the folder of each repository that the settings name, the model first. None: it must be downloaded.

    The keys are the names as the settings have them. Nothing is started.

    Raises:
        ConfigurationError: MODEL_NAME is invalid.
    """
    folders = {repositories.model(settings).value: model_folder(settings)}
    roots = snapshots.caches(settings)
    return folders | {each.value: snapshots.find(each, roots) for each in repositories.others(settings)}


def model_folder(settings: Settings) -> Path | None:
    """Return the model's folder or GGUF file. None: it must be downloaded.

    Raises:
        ConfigurationError: MODEL_NAME is invalid.
    """
    name = settings.model_name
    is_gguf = name.endswith(GGUF)
    if is_gguf and not any("gguf" in plugin.name for plugin in entry_points(group="vllm.general_plugins")):
        raise ConfigurationError(f"MODEL_NAME={name!r}: {NO_GGUF}")
    if (path := Path(name, settings.model_subfolder or "")).is_dir() or (is_gguf and path.is_file()):
        return path.resolve()
    if name.startswith(("/", ".", "~")) or (name.count("/") > 1 and not is_gguf):
        raise ConfigurationError(f"MODEL_NAME={name!r}: no such folder. Give a folder or a Hugging Face id (ORG/NAME).")
    return snapshots.find(repositories.model(settings), snapshots.caches(settings))


class Weights:
    """The folders of all repositories that the settings name.

    Starts a process that downloads the missing ones. If none is missing, it reads the model into the page cache.
    """

    def __init__(self, settings: Settings) -> None:
        self._folders = locate(settings)
        model = next(iter(self._folders.values()))
        missing = [name for name, folder in self._folders.items() if folder is None]
        self.are_local = not missing
        """Whether every repository is on disk."""
        self.need_no_hub = (
            self.are_local
            and not (model and snapshots.has_remote_code(model))
            # With these, vLLM may load repositories that the worker does not know of.
            and not (settings.vllm_extra_args or settings.libraries.loads_adapters_at_runtime)
        )
        """Whether vLLM needs nothing from the Hub."""
        if model is None or missing:
            module, arguments = "worker.model.download", missing
        else:
            module, arguments = "worker.model.prefetch", [str(path) for path in snapshots.weight_paths(model)]
        environ = settings.variables.values
        self._process = processes.start(module, *arguments, environ=environ, stdout=subprocess.PIPE, text=True)

    def folders(self) -> dict[str, Path]:
        """Wait for downloads. Return the folder of each name in the settings, the model's first.

        Raises:
            ConfigurationError: a name, a revision or the token is wrong.
            StartupError: the Hub cannot be reached, or the disk is full.
        """
        folders = self._folders if self.are_local else {**self._folders, **self._downloaded()}
        return {name: folder for name, folder in folders.items() if folder is not None}

    def _downloaded(self) -> dict[str, Path]:
        output, _ = self._process.communicate()
        try:
            result = json.loads(output)
        except ValueError:
            code = self._process.returncode
            raise StartupError(f"The download ended with exit code {code}. The log shows why.") from None
        if "error" in result:
            is_permanent = result["exit_code"] == ConfigurationError.exit_code
            raise (ConfigurationError if is_permanent else StartupError)(result["error"])
        return {name: Path(folder) for name, folder in result.items()}

    def close(self) -> None:
        """End the process if it still runs."""
        with self._process:
            self._process.kill()
