"""Removes files and batches of HTTP callers after their time. All functions block."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from worker.batch.objects import DAY
from worker.batch.store import Store, in_words
from worker.errors import BatchObjectNotFoundError


def remove_old(store: Store, now: float) -> None:
    """Remove files after their time, and batches that ended so long ago.

    What an open batch needs is kept: its input, and the results so far. Also removed is what workers left behind that
    were killed, such as incomplete uploads, once nothing has been written to it for a day.

    Raises:
        StorageError: the disk fails.
    """
    open_batches = store.open_batches()
    for owner in store.owners():
        needed = {batch.input_file_id for of, batch in open_batches if of == owner}
        keys = {batch.key for of, batch in open_batches if of == owner}
        for file_id in store.ids(owner, "files"):
            with suppress(BatchObjectNotFoundError):
                if store.file(owner, file_id).expires_at <= now and file_id not in needed:
                    store.remove(owner, file_id)
        for batch_id in store.ids(owner, "batches"):
            with suppress(BatchObjectNotFoundError):
                ended_at = store.batch(owner, batch_id).ended_at
                if ended_at is not None and ended_at + store.keep_seconds <= now:
                    store.remove_batch(owner, batch_id)
        kept = {*store.ids(owner, "files"), *store.ids(owner, "batches")}
        for path in _strays(store.folder / owner, kept, keys):
            # Another worker may remove it, too.
            with in_words(), suppress(FileNotFoundError):
                if now - path.stat().st_mtime > DAY:
                    path.unlink()


def _strays(folder: Path, kept: set[str], keys: set[str]) -> Iterator[Path]:
    """Yield the files that belong to no object, and to no open batch with one of these keys."""
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.split(".")[0] not in kept and not any(key in name for key in keys):
                yield Path(parent, name)
