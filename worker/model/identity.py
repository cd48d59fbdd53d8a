"""What identifies the content of a model's folder, so that machines can compare it without its path."""

import hashlib
from pathlib import Path

from worker.model.snapshots import weight_paths


def of_folder(folder: Path) -> str:
    """Return the commit of a snapshot in a cache, with the path within it.

    Another folder, or a file, has a hash of its configuration and of its weight files' names and sizes.
    """
    for snapshots in folder.parents:
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
            return folder.relative_to(snapshots).as_posix()
    files = [folder] if folder.is_file() else sorted(weight_paths(folder))
    lines = [f"{file.name} {file.stat().st_size}" for file in files]
    if (config := folder / "config.json").is_file():
        lines.append(config.read_text(errors="replace"))
    content = "\n".join(lines)
    return f"hash {hashlib.sha256(content.encode()).hexdigest()[:16]}"
