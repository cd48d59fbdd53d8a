"""Batches that came as jobs, or from the command line: from the input to the finished output, one at a time."""

import asyncio
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from worker import race, threads
from worker.batch import files
from worker.batch.asking import Asker
from worker.batch.files import Files
from worker.batch.journal import Journal
from worker.batch.progress import Counts, Progress
from worker.batch.runner import NotAnsweredError, Runner
from worker.batch.share import Share
from worker.batch.source import Source
from worker.batch.spec import BatchSpec, Volume
from worker.errors import BatchOutputError, JobError, Json
from worker.media.fetch import Policy
from worker.request.asgi import App
from worker.request.pipeline import Pipeline
from worker.settings import Settings

INLINE_BYTES = 10_000_000
"""Results of this size are part of the job's output. RunPod accepts 20 MB."""
STORED_BYTES = 100_000_000
"""Without a volume, larger results than that are handed to the stores for large results, all at once."""
LOG_SECONDS = 60.0
WATCH_SECONDS = 1.0
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")

log = logging.getLogger(__name__)


def _threads() -> Executor:
    return ThreadPoolExecutor(4, "batch")


@dataclass(frozen=True, slots=True)
class Shared:
    """What all batches of a worker share. `app` is the engine's, and `turn` lets one batch run at a time."""

    app: App
    pipeline: Pipeline
    settings: Settings
    policy: Policy
    share: Share
    has_priorities: bool = False
    """Whether the engine schedules requests by their priority."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    threads: Callable[[], Executor] = _threads
    """Returns the threads of one batch, for everything that blocks."""


class Batch:
    """One batch. `files` are those of the command line; without them, they follow from `spec`."""

    def __init__(self, name: str, spec: BatchSpec, shared: Shared, placed: Files | None = None) -> None:
        self._name = name
        self._spec = spec
        self._shared = shared
        self._lifecycle = shared.pipeline.lifecycle
        self._files = placed
        self._runner: Runner | None = None
        self._counted = Counts()
        self._executor: Executor | None = None
        self._began = time.monotonic()
        self.is_stopped = False
        """Whether it ended because the worker stops, or its engine died."""

    @property
    def is_kept(self) -> bool:
        """Whether another worker can go on where this one stopped, or begin a batch that waits for its turn."""
        return self._files.is_kept if self._files else Volume.of(self._shared.settings).exists

    @property
    def state(self) -> Progress | None:
        """How far the lines are; None before the first one."""
        return self._runner.progress if self._runner else None

    def progress(self) -> Json:
        """Return what `/status` and `/health` show."""
        if (state := self.state) is None:
            waits = self._executor is None
            message = "Another batch runs on this worker. This one begins after it." if waits else "Reading the input."
            return {"status": "waiting" if waits else "starting", "message": message}
        counts, left = state.counts, state.seconds_left
        return {
            "status": "running",
            "percent": None if state.percent is None else round(state.percent, 1),
            "total": state.total,
            "done": counts.done,
            **_summary(counts),
            "tokens_per_second": round(state.tokens_per_second, 1),
            "seconds": round(state.seconds, 1),
            "seconds_left": None if left is None else round(left),
        }

    async def run(self) -> Json:
        """Answer all lines that have not ended, and return the job's output.

        When this is cancelled, the output has the lines that ended, unless the worker stops: then the journal is kept.

        Raises:
            InvalidRequestError: the input is no batch, or a path is wrong.
            JobError: a fetch, a write or an upload has failed, or the worker stops.
        """
        working = asyncio.ensure_future(self._run_in_turn())
        try:
            await race.first(working, self._lifecycle.stopping.wait())
            if not working.done() and self._runner is not None:
                # The lines in flight may end.
                self._runner.stop()
                await asyncio.wait([working])
            if not working.done():
                await race.end(working)
                raise self._stopped()
            return working.result()
        finally:
            await race.end(working)

    def _stopped(self) -> JobError:
        self.is_stopped = True
        return self._lifecycle.error()

    async def _run_in_turn(self) -> Json:
        async with self._shared.turn:
            if self._lifecycle.state != "ready":
                # The engine has died in the batch before.
                raise self._stopped()
            self._executor = self._shared.threads()
            watching = asyncio.create_task(self._watch())
            try:
                with TemporaryDirectory(prefix="batch-") as folder:
                    return await self._run(self._executor, Path(folder))
            finally:
                await race.end(watching)
                self._observe(is_running=False)
                self._executor.shutdown(wait=False)

    async def _run(self, executor: Executor, folder: Path) -> Json:
        spec = self._spec
        if (placed := self._files) is None:
            key = await threads.call(executor, _key, self._name, spec)
            volume = Volume.of(self._shared.settings)
            placed = self._files = await threads.call(executor, files.place, spec, volume, key, folder)
        journal = await threads.call(executor, Journal.open, placed.output, placed.key, placed.errors)
        try:
            await threads.call(executor, placed.resume, journal)
            if not journal.finished:
                await self._answer_lines(journal, await self._source(executor, placed), executor)
                await self._finish(journal, executor)
        except asyncio.CancelledError:
            if not self._lifecycle.stopping.is_set() and not journal.finished:
                await threads.call(executor, placed.set_cut_mark)
                await threads.call(executor, journal.cut)
            raise
        finally:
            await threads.call(executor, journal.close)
            if journal.finished or not (self.is_stopped or self._lifecycle.stopping.is_set()):
                await threads.call(executor, placed.remove_fetched)
        return await self._output(journal.counts, placed, executor)

    async def _source(self, executor: Executor, placed: Files) -> Source:
        data, limit = self._spec.input, self._shared.settings.max_request_bytes
        if isinstance(data, list):
            return await threads.call(executor, Source.from_list, data, limit)
        if placed.kind == "base64":
            text = data.partition(",")[2] if data.startswith("data:") else data
            return await threads.call(executor, Source.from_base64, text, limit)
        if placed.kind == "link":
            await files.fetch(self._shared.policy, data, placed.input, self._shared.settings.max_batch_bytes)
        return Source.from_file(placed.input, limit)

    async def _answer_lines(self, journal: Journal, source: Source, executor: Executor) -> None:
        share, spec, shared = self._shared.share, self._spec, self._shared
        asker = Asker(shared.app, shared.pipeline, journal.key, spec.priority if shared.has_priorities else None)
        self._counted = journal.counts.copy()
        concurrency = partial(share.lines, spec.concurrency)
        self._runner = Runner(asker.ask, journal, source, concurrency, executor)
        log.info("Batch %s begins. %d lines have ended before", self._name, journal.counts.done)
        try:
            await self._runner.run()
        except NotAnsweredError:
            if self._lifecycle.state == "dead":
                await threads.call(executor, journal.suspects.add, self._runner.unanswered)
            raise self._stopped() from None

    async def _finish(self, journal: Journal, executor: Executor) -> None:
        finishing = asyncio.ensure_future(threads.call(executor, journal.finish, self._spec.order))
        try:
            await asyncio.shield(finishing)
        finally:
            # The thread cannot be cancelled, and nobody else may use the journal meanwhile.
            if not finishing.done():
                await asyncio.wait([finishing])

    async def _output(self, counts: Counts, placed: Files, executor: Executor) -> Json:
        where: Json
        if link := self._spec.upload_link:
            where = {"result_url": await files.upload(self._shared.policy, link, placed)}
        elif self._spec.output or (placed.is_kept and placed.output.stat().st_size > INLINE_BYTES):
            where = {"output": str(placed.output)}
        else:
            where = {"results": await threads.call(executor, _results, placed.output)}
        errors = str(placed.errors) if placed.errors else None
        seconds = round(time.monotonic() - self._began, 3)
        log.info("Batch %s: %d lines completed, %d failed", self._name, counts.completed, counts.failed)
        return {**_summary(counts), "total": counts.done, "seconds": seconds, **where, "errors": errors}

    async def _watch(self) -> None:
        """Report the progress every second, and log it every minute."""
        logged = time.monotonic()
        while True:
            self._observe()
            if time.monotonic() - logged >= LOG_SECONDS and (state := self.state):
                logged = time.monotonic()
                log.info("Batch %s: %s", self._name, described(state))
            await asyncio.sleep(WATCH_SECONDS)

    def _observe(self, *, is_running: bool = True) -> None:
        telemetry = self._shared.share.telemetry.batches
        if state := self.state:
            now, before = state.counts, self._counted
            telemetry.ended(now.completed - before.completed, now.failed - before.failed)
            self._counted = now
        telemetry.current = {"job": self._name, **self.progress()} if is_running else None


def described(state: Progress) -> str:
    """Return a batch's progress in words."""
    share = f"{state.percent:.1f} % of {state.total:,}" if state.percent is not None else "an unknown share of the"
    left = f"{state.seconds_left:.0f} s left" if state.seconds_left is not None else "an unknown time left"
    failed = f" ({state.counts.failed:,} failed)" if state.counts.failed else ""
    return f"{share} lines ended{failed}, {state.tokens_per_second:.0f} tokens per second, {left}"


def _summary(counts: Counts) -> Json:
    tokens = {"input": counts.tokens_in, "output": counts.tokens_out}
    return {"completed": counts.completed, "failed": counts.failed, "tokens": tokens}


def _key(name: str, spec: BatchSpec) -> str:
    """Return the key of a batch: the same for a job that is given again, another one for every other batch."""
    digest = hashlib.sha256(json.dumps(spec.model_dump(), sort_keys=True).encode()).hexdigest()
    return f"{_UNSAFE.sub('_', name)[:60]}-{digest[:16]}"


def _results(path: Path) -> list[Json]:
    """Return the results in an output."""
    if (size := path.stat().st_size) > STORED_BYTES:
        raise BatchOutputError(
            f"The results have {size / 1e6:.0f} MB, which is too much for a job's output. Attach a network volume to "
            "the endpoint, or set 'batch.output' to a link presigned for PUT."
        )
    with path.open("rb") as file:
        return [json.loads(line) for line in file]
