"""Runs the batches of HTTP callers, one at a time, in the order of their creation."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

from worker import race, threads
from worker.batch import output, results, retention
from worker.batch.files import Files
from worker.batch.job import Batch, Shared
from worker.batch.journal import Journal
from worker.batch.objects import DAY, HOUR, BatchObject, End, FileObject, Mistake, Mistakes
from worker.batch.progress import Counts
from worker.batch.source import NotBatchError
from worker.batch.spec import BatchSpec
from worker.batch.store import Store
from worker.errors import JobError, StorageError
from worker.lifecycle import Lifecycle
from worker.request.pipeline import only_job_errors
from worker.settings import Settings

WATCH_SECONDS = 0.25
"""How soon a running batch notices that it was cancelled."""
SAVE_SECONDS = 2.0
"""How often the counts of a running batch are written."""
POLL_SECONDS = 5.0
"""How soon batches are found that another worker has accepted or left."""

log = logging.getLogger(__name__)


class BatchService:
    """The batches in a store. Several workers may share it: each batch is run by one of them at a time."""

    def __init__(self, store: Store, lifecycle: Lifecycle) -> None:
        self.store = store
        self._lifecycle = lifecycle
        self._call = partial(threads.call, store.threads)
        self._created = asyncio.Event()
        self._running = ""
        """The batch that this worker runs. Where files cannot be locked, only this tells it from one that waits."""

    @classmethod
    def of(cls, settings: Settings, lifecycle: Lifecycle) -> "BatchService | None":
        """Return the service for a worker with these settings; None if it has none."""
        if settings.batch_folder is None or settings.mode != "http":
            return None
        folder, keep_seconds = Path(settings.batch_folder), settings.batch_keep_days * DAY
        return cls(Store(folder, keep_seconds, settings.max_batch_folder_bytes), lifecycle)

    async def run(self, shared: Shared) -> None:
        """Run batches until the worker stops. A batch that then runs is left for the next start."""
        stopping = self._lifecycle.stopping
        removing = asyncio.create_task(self._remove_old())
        try:
            while not stopping.is_set():
                self._created.clear()
                if not await self._run_next(shared):
                    await race.first(stopping.wait(), self._created.wait(), asyncio.sleep(POLL_SECONDS))
        finally:
            await race.end(removing)

    def notice(self) -> None:
        """Start a batch that was just created, if none runs."""
        self._created.set()

    async def cancel(self, owner: str, batch: BatchObject) -> BatchObject:
        """Cancel a batch. One that does not run ends at once; the worker that runs it ends it soon.

        Raises:
            StorageError: the disk is full or fails.
        """
        await self._call(self.store.cancel, owner, batch.id)
        if batch.id != self._running:
            async with self._locked(owner, batch.id) as batch_to_end:
                if batch_to_end is not None:
                    await self._end(owner, batch_to_end, _early_end(batch_to_end) or "cancelled")
        return await self._call(self.store.batch, owner, batch.id)

    @asynccontextmanager
    async def _locked(self, owner: str, batch_id: str) -> AsyncIterator[BatchObject | None]:
        """Lock an open batch for this block, and yield it. None if another worker runs it, or it has ended."""
        if (lock := await self._call(self.store.lock, owner, batch_id)) is None:
            yield None
            return
        with lock:
            batch = await self._call(self.store.batch, owner, batch_id)
            yield batch if batch.ended_at is None else None

    async def _remove_old(self) -> None:
        while True:
            with _logged("Old files of batches are not removed"):
                await self._call(retention.remove_old, self.store, time.time())
            await asyncio.sleep(HOUR)

    async def _run_next(self, shared: Shared) -> bool:
        """Run the oldest batch that no other worker runs. Return whether there may be another one to run now."""
        open_batches: list[tuple[str, BatchObject]] = []
        with _logged("No batch runs"):
            open_batches = await self._call(self.store.open_batches)
        for owner, batch in open_batches:
            # One that cannot be ended must not keep the others from running.
            with _logged(f"The batch {batch.id} does not run"):
                async with self._locked(owner, batch.id) as batch_to_run:
                    if batch_to_run is not None:
                        return await self._run(shared, owner, batch_to_run)
        return False

    async def _run(self, shared: Shared, owner: str, batch: BatchObject) -> bool:
        """Run a batch until it ends. Return False if the worker stops first.

        Raises:
            StorageError: the state cannot be read or written. The batch goes on later.
        """
        job, self._running = self._job(shared, owner, batch), batch.id
        try:
            with only_job_errors(batch.id):
                batch, status = await self._answer(owner, batch, job)
        except StorageError:
            raise
        except JobError as error:
            if job.is_stopped:
                return False
            batch = _failed(await self._call(self.store.batch, owner, batch.id), error)
            # Saved before the results are cut: after a kill, cut results look like complete ones.
            await self._call(self.store.save, owner, batch)
            await self._end(owner, batch, "failed")
        else:
            await self._end(owner, batch, status)
        finally:
            self._running = ""
        return True

    def _job(self, shared: Shared, owner: str, batch: BatchObject) -> Batch:
        store = self.store
        source, target, errors = (
            store.content(owner, each) for each in (batch.input_file_id, batch.output_id, batch.errors_id)
        )
        spec = BatchSpec(input=str(source), output=str(target))
        return Batch(batch.id, spec, shared, Files(batch.key, "path", source, target, errors))

    async def _answer(self, owner: str, batch: BatchObject, job: Batch) -> tuple[BatchObject, End]:
        """Answer the lines, and return the batch with the status with which it ends.

        Raises:
            JobError: it failed, or the worker stops.
        """
        if (end := _early_end(batch)) is not None:
            return batch, end
        batch = batch.moved("in_progress", round(time.time()))
        await self._call(self.store.save, owner, batch)
        running, saved = asyncio.ensure_future(job.run()), time.monotonic()
        try:
            while not (await asyncio.wait([running], timeout=WATCH_SECONDS))[0]:
                current = await self._call(self.store.batch, owner, batch.id)
                if (end := _early_end(current)) is not None:
                    return _noted(current, job), end
                if time.monotonic() - saved >= SAVE_SECONDS and (noted := _noted(batch, job)) != batch:
                    batch, saved = noted, time.monotonic()
                    await self._call(self.store.save, owner, batch)
            running.result()
            return _noted(batch, job), "completed"
        finally:
            # A batch that is cancelled, and not stopped, writes its output here.
            await race.end(running)

    async def _end(self, owner: str, batch: BatchObject, status: End) -> None:
        """Make the results files of the owner, and note the end. Killed in between, it is done again."""
        await self._call(self._write_end, owner, batch, status)
        log.info("Batch %s is %s.", batch.id, status)

    def _write_end(self, owner: str, batch: BatchObject, status: End) -> None:
        """Write the end of a batch to the disk. Blocks."""
        store, now = self.store, round(time.time())
        counts = self._close_results(owner, batch)
        if status == "completed":
            batch = batch.moved("finalizing", now)
        fields = {"output_file_id": batch.output_id, "error_file_id": batch.errors_id}
        sizes = {file_id: _size(store.content(owner, file_id)) for file_id in fields.values()}
        for field, file_id in fields.items():
            if size := sizes[file_id]:
                store.save(owner, self._result_file(batch, field, file_id, size, now))
                batch = batch.model_copy(update={field: file_id})
        batch = batch.counted(counts, batch.request_counts.total).moved(status, now)
        store.save(owner, batch)
        store.forget_marks(owner, batch.id)
        for file_id in (file_id for file_id, size in sizes.items() if not size):
            store.remove(owner, file_id)

    def _result_file(self, batch: BatchObject, field: str, file_id: str, size: int, now: int) -> FileObject:
        seconds = min(batch.output_seconds or self.store.keep_seconds, self.store.keep_seconds)
        name = f"{batch.id}_{field.partition('_')[0]}.jsonl"
        return FileObject(
            id=file_id, bytes=size, created_at=now, expires_at=now + seconds, filename=name, purpose="batch_output"
        )

    def _close_results(self, owner: str, batch: BatchObject) -> Counts:
        """Finish the results of a batch, complete or not, and return their counts. Blocks."""
        path, errors = self.store.content(owner, batch.output_id), self.store.content(owner, batch.errors_id)
        journal = Journal.open(path, batch.key, errors)
        try:
            if not journal.finished:
                journal.cut()
        finally:
            journal.close()
        # A batch that was cut has the lines that failed in its output.
        with output.in_words(path), path.open("rb") as file:
            summaries = (results.summary(batch.key, line) for line in file)
            if any(summary and not summary.is_ok for summary in summaries):
                output.write(file.fileno(), batch.key, "ended", path, errors)
        return journal.counts


@contextmanager
def _logged(problem: str) -> Iterator[None]:
    """Log an error instead of raising it. What failed is tried again later."""
    try:
        with only_job_errors("of a batch"):
            yield
    except JobError as error:
        log.warning("%s: %s", problem, error)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _early_end(batch: BatchObject) -> End | None:
    """Return how a batch ends that may not go on; None if it may."""
    if batch.errors:
        return "failed"
    if batch.status == "cancelling":
        return "cancelled"
    return "expired" if batch.expires_at <= time.time() else None


def _noted(batch: BatchObject, job: Batch) -> BatchObject:
    """Return a batch that runs with its progress."""
    if (state := job.state) is None:
        return batch
    batch = batch.counted(state.counts, state.total or 0)
    is_answered = state.total is not None and state.counts.done >= state.total
    return batch.moved("finalizing", round(time.time())) if is_answered else batch


def _failed(batch: BatchObject, error: JobError) -> BatchObject:
    """Return a batch with the reasons for which it failed. Of one whose input is no batch, no line was asked."""
    began = None if isinstance(error, NotBatchError) else batch.in_progress_at
    return batch.model_copy(update={"errors": _mistakes(error), "in_progress_at": began})


def _mistakes(error: JobError) -> Mistakes:
    """Return why a batch failed: the first lines that are wrong, or the error itself."""
    if isinstance(error, NotBatchError) and error.lines:
        found = [Mistake(code=line.code, message=line.message, line=line.number) for line in error.lines]
        return Mistakes(data=tuple(found))
    return Mistakes(data=(Mistake(code=error.type, message=str(error), param=error.param),))
