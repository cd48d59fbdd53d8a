"""What is on disk already: where caches are, and whether what is there is complete. Asks nobody else."""

import fnmatch
import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from worker.model.repositories import GGUF, Repository
from worker.settings.settings import Settings

BAKED = Path("/models")
"""Where the image's build puts a model."""
HUB_FOLDER = Path("huggingface-cache/hub")
"""RunPod's cache of models on a network volume."""

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")
_HEADER_BYTES = 100_000_000
FORMATS = (".safetensors", ".bin", ".pt", GGUF)
"""Of weights; vLLM loads the first that is there."""


def caches(settings: Settings, environ: Mapping[str, str]) -> list[Path]:
    """Return the folders in the Hub's layout that may hold the model, the fastest first."""
    home = Path(environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")).expanduser()
    said = [settings.download_dir, environ.get("HF_HUB_CACHE"), home / "hub"]
    volume = Path(settings.base_path) / HUB_FOLDER
    return list(dict.fromkeys(Path(folder) for folder in (BAKED, *said, volume) if folder))


def download_folder(settings: Settings, environ: Mapping[str, str]) -> Path | None:
    """Return the cache into which a model is downloaded; None: the Hub's own."""
    if settings.download_dir:
        return Path(settings.download_dir)
    volume = Path(settings.base_path)
    if volume.is_dir() and not {"HF_HOME", "HF_HUB_CACHE"} & environ.keys():
        return volume / HUB_FOLDER
    return None


def find(wanted: Repository, roots: Iterable[Path]) -> Path | None:
    """Return the folder of a complete snapshot in one of the caches, or the file of it that is wanted."""
    for root in roots:
        for repository in _repositories(root, wanted.name):
            snapshot = _snapshot(repository, wanted.revision)
            if snapshot is None or marker(snapshot).exists():
                continue
            if is_complete(path := snapshot / (wanted.path or ""), wanted):
                return path
    return None


def marker(snapshot: Path) -> Path:
    """Return the file that is there while a snapshot is being downloaded, and for as long as it has not been."""
    return snapshot.parent.parent / f"incomplete-{snapshot.name}"


def _repositories(root: Path, name: str) -> Iterator[Path]:
    """Yield the cache's folders of a model; RunPod's have been seen in lower case."""
    wanted = f"models--{name.replace('/', '--')}"
    try:
        entries = list(root.iterdir())
    except OSError:
        return
    yield from (entry for entry in entries if entry.name == wanted)
    yield from (entry for entry in entries if entry.name != wanted and entry.name.lower() == wanted.lower())


def _snapshot(repository: Path, revision: str | None) -> Path | None:
    """Return the folder of a branch, a tag or a commit; a cache with a single snapshot and no branch has that one."""
    snapshots = repository / "snapshots"
    try:
        commit = (repository / "refs" / (revision or "main")).read_text().strip()
    except OSError:
        commit = revision or ""
    if commit and (snapshots / commit).is_dir():
        return snapshots / commit
    if revision is None:
        try:
            (only,) = snapshots.iterdir()
        except (OSError, ValueError):
            return None
        return only
    return None


def is_complete(path: Path, wanted: Repository) -> bool:
    """Tell whether every file that is wanted is there, weights with the size that they say of themselves."""
    try:
        if wanted.is_file:
            return path.stat().st_size > 0
        names = {file.name for file in path.iterdir() if file.is_file()}
        if not all(any(fnmatch.filter(names, pattern) for pattern in group) for group in wanted.needs):
            return False
        return not wanted.has_weights or _has_whole_weights(path, names)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error):
        # Whatever else is in a foreign file.
        return False


def asks_for_more(folder: Path) -> bool:
    """Tell whether a model's configuration names code in another repository of the Hub."""
    try:
        return "--" in json.dumps(json.loads((folder / "config.json").read_text()).get("auto_map", {}))
    except (OSError, ValueError, AttributeError):
        return False


def _has_whole_weights(folder: Path, names: set[str]) -> bool:
    suffix = next((one for one in FORMATS if any(name.endswith(one) for name in names)), None)
    if suffix is None:
        return False
    named = {file for file in _named_in_indexes(folder, names) if file.endswith(suffix)}
    weights = named or {name for name in names if name.endswith(suffix)}
    return named <= names and all(_is_whole(folder / name, names, numbered=not named) for name in weights)


def _named_in_indexes(folder: Path, names: Iterable[str]) -> set[str]:
    indexes = (json.loads((folder / name).read_text()) for name in names if name.endswith(".index.json"))
    return {file for index in indexes for file in index.get("weight_map", {}).values()}


def _is_whole(file: Path, names: set[str], numbered: bool) -> bool:
    """Tell whether a file has its size and, of a set told by numbers, the others are there."""
    if numbered and (shard := _SHARD.search(file.name)):
        others = (f"{file.name[: shard.start()]}-{number:05}-of-{shard[2]}." for number in range(1, int(shard[2]) + 1))
        if not all(any(name.startswith(other) for name in names) for other in others):
            return False
    if file.suffix != ".safetensors":
        return file.stat().st_size > 0
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > _HEADER_BYTES:
            return False
        header = json.loads(opened.read(length))
    ends = (tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__")
    return bool(file.stat().st_size == 8 + length + max(ends, default=0))
