"""A file of an HTTP caller while it arrives: on the disk from the beginning, and visible once it is complete."""

import logging
import os
import time
from contextlib import suppress

from worker.batch import output
from worker.batch.objects import FileObject, new_key
from worker.batch.store import INCOMPLETE, Store, in_words
from worker.errors import StorageError

log = logging.getLogger(__name__)


class Incoming:
    """The file. All methods block. `discard` ends its use in any case."""

    def __init__(self, store: Store, owner: str) -> None:
        self._store = store
        self._owner = owner
        self._id = f"file-{new_key(time.time())}"
        self._path = store.content(owner, self._id)
        self._temporary = self._path.with_name(f"{self._path.name}{INCOMPLETE}")
        self._failure: StorageError | None = None
        with in_words():
            self._file = self._temporary.open("wb", buffering=0)

    def write(self, data: bytes) -> None:
        """Append some bytes. After a failure they are dropped: `keep` reports it once the client has sent everything.

        Many clients read no answer before.
        """
        rest = memoryview(data)
        try:
            with in_words():
                while rest and self._failure is None:
                    rest = rest[self._file.write(rest) :]
        except StorageError as error:
            self._failure = error
            # The disk may be full: what follows does not help anybody.
            self._temporary.unlink(missing_ok=True)

    def keep(self, filename: str, seconds: int) -> FileObject:
        """Make the file exist for its owner, for so long.

        Raises:
            BatchFullError: there is no room for it. Its size was not known before, or others were added meanwhile.
            StorageError: it could not be written.
        """
        if self._failure:
            raise self._failure
        with in_words():
            size = self._file.tell()
            os.fsync(self._file.fileno())
            with self._store.adding(size):
                self._temporary.replace(self._path)
            output.sync_folder(self._path)
        now = round(time.time())
        kept = FileObject(
            id=self._id, bytes=size, created_at=now, expires_at=now + seconds, filename=filename, purpose="batch"
        )
        try:
            self._store.save(self._owner, kept)
        except StorageError:
            self._store.remove(self._owner, self._id)
            raise
        log.info("File %s was uploaded: %d bytes", self._id, size)
        return kept

    def discard(self) -> None:
        """Remove what is there, unless it was kept."""
        with suppress(OSError):
            self._file.close()
            self._temporary.unlink(missing_ok=True)
