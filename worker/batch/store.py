"""The files and batches of HTTP callers on disk: below `BATCH_FOLDER`, one folder for each owner.

`OWNER/files` has `ID.json`, the file's object, beside `ID.data`, its content. A file exists once its object does.
`OWNER/batches` has `ID.json`; `ID.cancel` once its owner has cancelled the batch; and `ID.lock`, which the worker holds
that runs it. Objects are replaced as a whole. Several workers may use the same folder.

All methods block, and are called in threads.
"""

import fcntl
import hashlib
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from worker.batch import output
from worker.batch.objects import BATCH_ID, FILE_ID, BatchObject, FileObject
from worker.errors import (
    BatchBusyError,
    BatchFullError,
    BatchObjectNotFoundError,
    ConfigurationError,
    StorageError,
)

MAX_OBJECTS = 10_000
"""The most files, and the most batches, of one owner."""
INCOMPLETE = ".tmp"
"""The end of the name of an upload's content while it arrives."""
PUBLIC = "public"
"""The owner of everything if the worker needs no key."""

_OWNER = re.compile(f"{PUBLIC}|key-[0-9a-f]{{32}}")
_REMEDY = {"files": "Delete some.", "batches": "Old ones are removed after BATCH_KEEP_DAYS."}
_SALT = b"files and batches of one API key"

Kind = Literal["files", "batches"]
Object = TypeVar("Object", bound=BaseModel)

log = logging.getLogger(__name__)


def owner_of(key: str) -> str:
    """Return the name of a key's folder. It does not reveal the key: scrypt makes guessing slow. Takes 0.05 s."""
    return f"key-{hashlib.scrypt(key.encode(), salt=_SALT, n=2**14, r=8, p=1, dklen=16).hex()}"


class Store:
    """The folder. `most` is how many bytes all its files together may have when another one is added."""

    def __init__(self, folder: Path, keep_seconds: float, most: int) -> None:
        self.folder = folder
        self.threads = ThreadPoolExecutor(8, "batch files")
        """For calls of these methods. A disk that hangs then blocks nothing else."""
        self.keep_seconds = int(keep_seconds)
        self._most = most
        self._adding = threading.Lock()
        self._ended: set[str] = set()
        """Batches that are known to have ended. They do not change any more."""

    def prepare(self) -> None:
        """Create the folder, and check that files can be written there.

        The folder above it must exist. So a volume that is missing is noticed.

        Raises:
            ConfigurationError: they cannot.
        """
        probe = self.folder / f".{os.getpid()}.probe"
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigurationError(
                f"BATCH_FOLDER={str(self.folder)!r} cannot be used: {error.strerror}. It must be a folder that the "
                "worker can write, such as one on the network volume. The folder above it must exist."
            ) from None

    # ---- Objects

    def file(self, owner: str, file_id: str) -> FileObject:
        """Return a file.

        Raises:
            BatchObjectNotFoundError: this owner has no such file.
        """
        found = _read(self._path(owner, "files", file_id), FileObject) if FILE_ID.fullmatch(file_id) else None
        if found is None:
            raise BatchObjectNotFoundError("file", file_id)
        return found

    def batch(self, owner: str, batch_id: str) -> BatchObject:
        """Return a batch. One that was cancelled and has not ended is `cancelling`.

        Raises:
            BatchObjectNotFoundError: this owner has no such batch.
        """
        path = self._path(owner, "batches", batch_id)
        found = _read(path, BatchObject) if BATCH_ID.fullmatch(batch_id) else None
        if found is None:
            raise BatchObjectNotFoundError("batch", batch_id)
        if found.ended_at is None:
            with suppress(OSError):
                found = found.moved("cancelling", int(path.with_suffix(".cancel").stat().st_mtime))
        return found

    def save(self, owner: str, item: FileObject | BatchObject) -> None:
        """Write an object, at once or not at all.

        Raises:
            StorageError: the disk is full or fails.
        """
        path = self._path(owner, "files" if isinstance(item, FileObject) else "batches", item.id)
        with in_words(), output.replacing(path) as file:
            file.write(item.model_dump_json().encode())
        with in_words():
            output.sync_folder(path)

    def content(self, owner: str, file_id: str) -> Path:
        """Return the path of a file's content."""
        return self._path(owner, "files", file_id).with_suffix(".data")

    def objects(
        self, owner: str, kind: Kind, after: str = "", *, is_ascending: bool = True
    ) -> Iterator[FileObject | BatchObject]:
        """Yield an owner's objects behind the id `after`, in the order of their creation, or against it."""
        find = self.file if kind == "files" else self.batch
        ids = self.ids(owner, kind)
        for each in ids if is_ascending else reversed(ids):
            if not after or (each > after if is_ascending else each < after):
                # Others may remove it meanwhile.
                with suppress(BatchObjectNotFoundError):
                    yield find(owner, each)

    def open_batches(self) -> list[tuple[str, BatchObject]]:
        """Return all batches that have not ended, with their owners, in the order of their creation."""
        found = []
        for owner in self.owners():
            for batch_id in self.ids(owner, "batches"):
                if batch_id in self._ended:
                    continue
                with suppress(BatchObjectNotFoundError):
                    if (batch := self.batch(owner, batch_id)).ended_at is None:
                        found.append((owner, batch))
                    else:
                        self._ended.add(batch_id)
        return sorted(found, key=lambda pair: pair[1].id)

    def cancel(self, owner: str, batch_id: str) -> None:
        """Note that a batch was cancelled, for whoever runs it."""
        with in_words():
            self._path(owner, "batches", batch_id).with_suffix(".cancel").touch()

    def lock(self, owner: str, batch_id: str) -> BinaryIO | None:
        """Return a file that locks a batch until it is closed, or the process ends; None if the batch is locked.

        On a file system that knows no locks a batch is never locked.
        """
        path = self._path(owner, "batches", batch_id).with_suffix(".lock")
        with in_words():
            file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            log.warning("Batches are not locked: %s. Let only one worker use BATCH_FOLDER.", error.strerror)
        return file

    def forget_marks(self, owner: str, batch_id: str) -> None:
        """Remove what only a batch that runs needs."""
        path = self._path(owner, "batches", batch_id)
        for each in (path.with_suffix(".cancel"), path.with_suffix(".lock")):
            with suppress(OSError):
                each.unlink(missing_ok=True)

    def delete_file(self, owner: str, file_id: str) -> None:
        """Remove a file.

        Raises:
            BatchObjectNotFoundError: this owner has no such file.
            BatchBusyError: a batch still needs it.
        """
        self.file(owner, file_id)
        for batch_owner, batch in self.open_batches():
            if batch_owner == owner and batch.input_file_id == file_id:
                raise BatchBusyError(
                    f"The batch {batch.id!r} still needs the file. Wait for its end, or cancel it first."
                )
        self.remove(owner, file_id)

    def remove(self, owner: str, file_id: str) -> None:
        """Remove a file that nobody needs, whether or not it exists."""
        with in_words():
            self._path(owner, "files", file_id).unlink(missing_ok=True)
            self.content(owner, file_id).unlink(missing_ok=True)

    def remove_batch(self, owner: str, batch_id: str) -> None:
        """Remove a batch that has ended."""
        with in_words():
            self._path(owner, "batches", batch_id).unlink(missing_ok=True)
        self._ended.discard(batch_id)

    # ---- Room

    def make_room(self, owner: str, kind: Kind, size: int = 0) -> None:
        """Create an owner's folders, and check that there is room for one more object with `size` bytes.

        `BATCH_FOLDER` itself is not created: if it is missing now, its volume is missing.

        Raises:
            BatchFullError: there is not.
            StorageError: the folder is missing, or the disk fails.
        """
        folder = self.folder / owner
        with in_words():
            for each in (folder, folder / "files", folder / "batches"):
                each.mkdir(mode=0o700, exist_ok=True)
            free = shutil.disk_usage(folder).free
        if len(self.ids(owner, kind)) >= MAX_OBJECTS:
            raise BatchFullError(f"There are {MAX_OBJECTS:,} {kind} already. {_REMEDY[kind]}")
        self._check_limit(size)
        if size > free:
            raise BatchFullError(f"The disk has {free / 1e9:.1f} GB left, too little for this file. Delete files.")

    @contextmanager
    def adding(self, size: int) -> Iterator[None]:
        """Check that the limit leaves room for `size` more bytes. In this block no other upload takes it.

        Raises:
            BatchFullError: it does not.
        """
        with self._adding:
            self._check_limit(size)
            yield

    def _check_limit(self, size: int) -> None:
        with in_words():
            used = _size(self.folder)
        if used + size > self._most:
            raise BatchFullError(
                f"The files of batches have {used / 1e6:.1f} MB, and MAX_BATCH_FOLDER_BYTES={self._most} leaves no "
                f"room for {size / 1e6:.1f} MB more. Delete files, or raise the limit."
            )

    # ---- Paths

    def _path(self, owner: str, kind: Kind, name: str) -> Path:
        return self.folder / owner / kind / f"{name}.json"

    def owners(self) -> list[str]:
        """Return the names of all owners."""
        with in_words():
            return sorted(path.name for path in self.folder.iterdir() if _OWNER.fullmatch(path.name))

    def ids(self, owner: str, kind: Kind) -> list[str]:
        """Return the ids of an owner's objects in the order of their creation."""
        with in_words():
            try:
                names = [path.name for path in (self.folder / owner / kind).iterdir()]
            except FileNotFoundError:
                return []
        pattern = FILE_ID if kind == "files" else BATCH_ID
        ids = (name.removesuffix(".json") for name in names if name.endswith(".json"))
        return sorted(filter(pattern.fullmatch, ids))


@contextmanager
def in_words() -> Iterator[None]:
    """Raise an error for callers in place of one of the file system."""
    try:
        yield
    except OSError as error:
        raise StorageError(error.strerror or str(error)) from None


def _read(path: Path, kind: type[Object]) -> Object | None:
    """Return the object in a file; None if there is none."""
    with in_words():
        try:
            return kind.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            pass
        except ValidationError:
            log.error("%s is damaged, and is ignored.", path)
    return None


def _size(folder: Path) -> int:
    """Return the bytes of all files in a folder. Incomplete uploads do not count: they are checked at their end."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in (name for name in names if not name.endswith(INCOMPLETE)):
            # Others may remove files meanwhile.
            with suppress(FileNotFoundError):
                size += Path(parent, name).lstat().st_size
    return size
