"""Finds complete snapshots of repositories in caches on disk. Makes no requests."""

import fnmatch
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from worker.model.repositories import GGUF, Repository, weight_files
from worker.settings import Settings

BAKED = Path("/models")
"""Where the image's build puts a model."""
HUB_FOLDER = Path("huggingface-cache/hub")
"""RunPod's cache of models on a network volume."""
OWN_FOLDER = Path("vllm-worker-cache/hub")
"""The cache on a volume whose `HUB_FOLDER` belongs to another user."""

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")


def caches(settings: Settings) -> list[Path]:
    """Return the folders with the layout of the Hub's cache that may hold the model, the fastest first."""
    download_dirs = [Path(settings.download_dir)] if settings.download_dir else []
    hub_caches = settings.libraries.hub_caches
    volume = (settings.volume / HUB_FOLDER, settings.volume / OWN_FOLDER)
    return list(dict.fromkeys((BAKED, *download_dirs, *hub_caches, *volume)))


def download_folders(settings: Settings) -> list[Path]:
    """Return the caches to download to. The first writable one is used; all are among `caches`."""
    download_dirs = [Path(settings.download_dir)] if settings.download_dir else []
    hub_cache = settings.libraries.hub_caches[0]
    chosen = [hub_cache] if settings.libraries.chosen_cache else []
    volume = [settings.volume / HUB_FOLDER, settings.volume / OWN_FOLDER] if settings.volume.is_dir() else []
    return list(dict.fromkeys((*download_dirs, *chosen, *volume, hub_cache)))


def find(repository: Repository, roots: Iterable[Path]) -> Path | None:
    """Return the first complete snapshot in the caches: its folder, or the subfolder or file that is needed."""
    for root in roots:
        for folder in _cache_folders(root, repository.name):
            snapshot = _snapshot(folder, repository.revision)
            if snapshot is None or marker(snapshot).exists():
                continue
            if is_complete(path := snapshot / (repository.path or ""), repository):
                return path
    return None


def marker(snapshot: Path) -> Path:
    """Return the path of the file that marks a snapshot as incomplete. It exists until the download is complete."""
    return snapshot.parent.parent / f"incomplete-{snapshot.name}"


def _cache_folders(root: Path, name: str) -> list[Path]:
    """Return a repository's folders in a cache. Some of RunPod's have lower-case names."""
    expected = f"models--{name.replace('/', '--')}"
    try:
        folders = [folder for folder in root.iterdir() if folder.name.lower() == expected.lower()]
    except OSError:
        return []
    return sorted(folders, key=lambda folder: folder.name != expected)


def _snapshot(folder: Path, revision: str | None) -> Path | None:
    """Return the snapshot of a branch, tag or commit. Without a default branch, the only snapshot is the default."""
    snapshots = folder / "snapshots"
    commit = revision
    with suppress(OSError):
        commit = (folder / "refs" / (revision or "main")).read_text().strip()
    if commit and (snapshots / commit).is_dir():
        return snapshots / commit
    try:
        (snapshot,) = snapshots.iterdir()
    except (OSError, ValueError):
        return None
    return None if revision else snapshot


def is_complete(path: Path, repository: Repository) -> bool:
    """Return whether all required files exist and every weight file has the size that its header states."""
    try:
        if repository.is_file:
            return path.stat().st_size > 0
        names = {file.name for file in path.iterdir() if file.is_file()}
        if not all(any(fnmatch.filter(names, pattern) for pattern in group) for group in repository.required):
            return False
        return not repository.has_weights or _has_complete_weights(path, names)
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError):
        # Weight files and indexes may contain anything.
        return False


def has_remote_code(folder: Path) -> bool:
    """Return whether a model's configuration refers to code in another repository."""
    try:
        return "--" in json.dumps(json.loads((folder / "config.json").read_text()).get("auto_map", {}))
    except (OSError, ValueError, AttributeError):
        return False


def weight_paths(folder: Path) -> list[Path]:
    """Return the files in a folder that vLLM loads weights from. GGUF is left out: vLLM loads one file of several."""
    names = weight_files(file.name for file in folder.glob("*"))
    return [folder / name for name in names if not name.endswith(GGUF)]


def _has_complete_weights(folder: Path, names: set[str]) -> bool:
    files = weight_files(names)
    if not files:
        return False
    indexed = {name for name in _indexed(folder, names) if Path(name).suffix == Path(files[0]).suffix}
    return indexed <= names and all(_is_complete_file(folder / name, names, bool(indexed)) for name in indexed or files)


def _indexed(folder: Path, names: Iterable[str]) -> set[str]:
    """Return the files that the folder's index files list."""
    indexes = (json.loads((folder / name).read_text()) for name in names if name.endswith(".index.json"))
    return {file for index in indexes for file in index.get("weight_map", {}).values()}


def _is_complete_file(file: Path, names: set[str], is_indexed: bool) -> bool:
    """Return whether a file has its full size and, without an index, all shards of its set exist."""
    if not is_indexed and (shard := _SHARD.search(file.name)):
        stem, count = file.name[: shard.start()], shard[2]
        shards = (f"{stem}-{number:05}-of-{count}." for number in range(1, int(count) + 1))
        if not all(any(name.startswith(shard) for name in names) for shard in shards):
            return False
    if file.suffix != ".safetensors":
        return file.stat().st_size > 0
    # Raises SafetensorError unless the file has the size that its header states. Reads only the header.
    with safe_open(file, "numpy"):
        return True
