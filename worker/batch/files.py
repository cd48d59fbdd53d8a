"""The files of a batch that came as a job: where they are, the fetched input, and the upload of the output."""

import asyncio
import re
import shutil
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path

from worker.batch import output
from worker.batch.journal import Journal
from worker.batch.spec import BatchSpec, Kind, Volume
from worker.errors import BatchOutputError, MediaError, UnreachableError
from worker.media.checks import Limit
from worker.media.fetch import Fetcher, Policy
from worker.media.retry import retried
from worker.media.upload import upload_presigned

CONTENT_TYPE = "application/jsonl"
KEEP_DAYS = 7
"""How long results without a path of the caller's own stay on the volume."""
_KEY = re.compile(r"[A-Za-z0-9_-]+-[0-9a-f]{16}")
"""The key of a job's batch, which is the name of its folder."""
UPLOAD_SECONDS = 120.0
UPLOAD_BYTES_PER_SECOND = 500_000
"""An upload may take so long, and the time for its bytes at this rate."""


@dataclass(frozen=True, slots=True)
class Files:
    """The paths of one batch."""

    key: str
    kind: Kind
    """What the input is."""
    input: Path
    """The file with the input, if it is a path or a link."""
    output: Path
    errors: Path | None = None
    is_kept: bool = True
    """Whether another worker finds these files too: they are on the volume."""

    @property
    def _cut_mark(self) -> Path:
        """Exists if the batch was cancelled: its output is not complete."""
        return self.output.with_name(f".{self.key}.cut")

    def set_cut_mark(self) -> None:
        """Note that the output is cut, in case that the platform gives the job again."""
        with output.in_words(self.output):
            self._cut_mark.touch()

    def resume(self, journal: Journal) -> None:
        """Go on with a batch that was cut.

        Raises:
            BatchOutputError: the disk fails.
        """
        if self._cut_mark.exists():
            if journal.finished:
                journal.resume()
            self._cut_mark.unlink(missing_ok=True)

    def remove_fetched(self) -> None:
        """Remove a fetched input, which nobody needs any more."""
        if self.kind == "link":
            self.input.unlink(missing_ok=True)


def place(spec: BatchSpec, volume: Volume, key: str, temporary: Path) -> Files:
    """Return the paths, with their folders created. Without a volume they are in the folder `temporary`.

    Raises:
        InvalidRequestError: a path leads out of the volume, or a folder cannot be created.
    """
    errors = volume.path(spec.errors, "errors") if spec.errors else None
    if spec.output and not spec.upload_link:
        path, is_kept = volume.path(spec.output, "output"), True
    else:
        is_kept = volume.exists
        path = (volume.own_folder if is_kept else temporary) / key / "results.jsonl"
        if is_kept:
            _remove_old(volume.own_folder)
    for each in filter(None, (path, errors)):
        with output.in_words(each):
            each.parent.mkdir(parents=True, exist_ok=True)
    kind = spec.input_kind(volume)
    fetched = path.with_name(f".{key}.input")
    file = volume.path(str(spec.input), "input") if kind == "path" else fetched
    return Files(key, kind, file, path, errors, is_kept)


def _remove_old(folder: Path) -> None:
    """Remove the results of batches that ended a while ago. Other files of callers may lie beside them."""
    with suppress(OSError):
        for each in folder.iterdir():
            with suppress(OSError):
                if _KEY.fullmatch(each.name) and time.time() - each.stat().st_mtime > KEEP_DAYS * 86400:
                    shutil.rmtree(each, ignore_errors=True)


async def fetch(policy: Policy, link: str, path: Path, limit: int) -> None:
    """Fetch a batch's input to a file, unless an earlier worker has. The file appears when it is complete.

    Raises:
        MediaError: the link is not allowed, or the fetch failed.
        BatchOutputError: the disk is full or fails.
    """
    if await asyncio.to_thread(path.exists):
        return
    async with aclosing(Fetcher(policy)) as fetcher:
        try:
            await retried(lambda: _save(fetcher.pieces(link, Limit("MAX_BATCH_BYTES", limit)), path))
        except MediaError as error:
            raise _named("input", error) from None


async def _save(pieces: AsyncGenerator[bytes, None], path: Path) -> None:
    temporary = output.temporary(path)
    try:
        with temporary.open("wb") as file:
            async with aclosing(pieces):
                async for piece in pieces:
                    await asyncio.to_thread(file.write, piece)
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BatchOutputError(
            f"The input of the batch cannot be stored: {reason}. Free some space, or attach a network volume."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


async def upload(policy: Policy, link: str, files: Files) -> str:
    """Upload the output to the caller's link, and return the link without its signature.

    Raises:
        MediaError: the link is not allowed, or its server has not accepted the file.
    """
    seconds = UPLOAD_SECONDS + files.output.stat().st_size / UPLOAD_BYTES_PER_SECOND
    kept = f" The results are kept at {files.output}." if files.is_kept else ""
    try:
        async with asyncio.timeout(seconds):
            return await upload_presigned(policy, link, files.output, CONTENT_TYPE)
    except TimeoutError:
        raise UnreachableError(f"'batch.output': the upload took longer than {seconds:.0f} s.{kept}") from None
    except MediaError as error:
        raise _named("output", error, kept) from None


def _named(field: str, error: MediaError, note: str = "") -> MediaError:
    """Return the error of a link with the field that holds it."""
    return type(error)(f"'batch.{field}': {error}.{note}", param=f"batch.{field}")
