"""Runs a batch: keeps as many lines in flight as wanted, and records each that ends."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Executor
from contextlib import aclosing, suppress

from worker import race, threads
from worker.batch import results
from worker.batch.journal import Journal
from worker.batch.lines import Line, LineError
from worker.batch.progress import Progress, progress
from worker.batch.reader import Reader
from worker.batch.source import ClosedError, Source
from worker.batch.writer import Writer
from worker.errors import Json

Ask = Callable[[Line], Awaitable[tuple[int, Json | None]]]
"""Asks the engine, and returns the status and the body of its answer, which may be an error.

Raises `NotAnsweredError` if another worker, or this one later, has to ask again.
"""

POLL_SECONDS = 0.1
"""How soon a change of the concurrency is noticed, if no line ends before."""


class NotAnsweredError(Exception):
    """A line has no answer, because the worker stops or its engine has died. The line stays open."""


class Runner:
    """One run of a batch by one worker, from where its journal is."""

    def __init__(
        self, ask: Ask, journal: Journal, source: Source, concurrency: Callable[[], int], executor: Executor
    ) -> None:
        """Take how to ask, and a function that returns how many lines may be in flight now; 0 pauses the batch.

        The executor needs four threads: for reading, counting, writing and syncing.
        """
        self.unanswered: list[int] = []
        """The lines that were asked and have no answer."""
        self._is_alone = False
        """Whether the line in flight must be the only one."""
        self._ask = ask
        self._journal = journal
        self._source = source
        self._concurrency = concurrency
        self._executor = executor
        self._writer = Writer(journal, executor)
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._changed = asyncio.Event()
        self._before = journal.counts.copy()
        self._total = self._before.done if journal.finished else None
        self._started = asyncio.get_running_loop().time()

    @property
    def progress(self) -> Progress:
        """How far the batch is."""
        seconds = asyncio.get_running_loop().time() - self._started
        return progress(self._before, self._journal.counts, self._total, seconds)

    async def run(self) -> None:
        """Return once every line of the input has ended and is in the journal. Finishing the journal is left to do.

        After a `NotAnsweredError` no line starts, and those in flight may end. Any other error ends them. When this is
        cancelled, it ends at once; the journal then has all lines that ended.

        The source is closed in any case.

        Raises:
            NotAnsweredError: a line was not answered.
            InvalidRequestError: the input is no batch, cannot be read, is damaged, or has too many lines.
            BatchOutputError: the disk is full or fails.
        """
        if self._journal.finished:
            return
        counting = asyncio.create_task(self._count())
        counting.add_done_callback(self._note_end)
        try:
            with suppress(ClosedError):
                await threads.call(self._executor, self._source.check)
                await self._start_lines()
            await self._wait_for_tasks()
            if self._failure is None:
                await asyncio.wait([counting])
        finally:
            self._source.close()
            await race.end(counting, *self._tasks)
            await self._writer.close()
        if self._failure:
            raise self._failure

    def stop(self) -> None:
        """Start no more lines: those in flight may end, then `run` raises `NotAnsweredError`."""
        self._failure = self._failure or NotAnsweredError()
        # One line may expand to gigabytes.
        self._source.close()
        self._changed.set()

    async def _count(self) -> None:
        self._total = await threads.call(self._executor, self._source.count)

    async def _start_lines(self) -> None:
        """Start every line that has not ended. After a failure no more start."""
        async with aclosing(self._open_lines()) as lines:
            async for line in lines:
                is_alone = line.number in self._journal.suspects
                if not await self._has_room(is_alone=is_alone):
                    break
                self._is_alone = is_alone
                self._start(line)

    async def _open_lines(self) -> AsyncGenerator[Line | LineError, None]:
        """Yield the lines that have not ended. While some wait here for a place, the next ones are read."""
        reader = Reader(self._source, self._journal)
        reading = asyncio.ensure_future(threads.call(self._executor, reader.read))
        try:
            while lines := await reading:
                reading = asyncio.ensure_future(threads.call(self._executor, reader.read))
                for line in lines:
                    yield line
        finally:
            await race.end(reading)

    async def _has_room(self, *, is_alone: bool) -> bool:
        """Wait until another line may start. Return False if none may any more."""
        while self._failure is None and len(self._tasks) >= (1 if is_alone or self._is_alone else self._concurrency()):
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), POLL_SECONDS)
        return self._failure is None

    async def _wait_for_tasks(self) -> None:
        """Wait until all lines have ended, or must be ended."""
        while self._tasks and (self._failure is None or isinstance(self._failure, NotAnsweredError)):
            self._changed.clear()
            await self._changed.wait()

    def _start(self, line: Line | LineError) -> None:
        # Another worker may have ended it meanwhile.
        if line.number not in self._journal:
            task = asyncio.create_task(self._answer(line))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(self._note_end)

    async def _answer(self, line: Line | LineError) -> None:
        key = self._journal.key
        if isinstance(line, Line) and (error := self._journal.suspects.error(line.number, line.custom_id)):
            line = error
        if isinstance(line, LineError):
            await self._writer.add(results.refused(key, line))
            return
        try:
            status, body = await self._ask(line)
        except NotAnsweredError:
            self.unanswered.append(line.number)
            raise
        await self._writer.add(results.answered(key, line, status, body))

    def _note_end(self, task: "asyncio.Task[None]") -> None:
        self._changed.set()
        # Outside of the run's own end, a line that is cancelled is one without an answer.
        error = NotAnsweredError() if task.cancelled() else task.exception()
        if isinstance(error, ClosedError):
            return
        # An error that ends the batch at once counts more than one that does not.
        if error and (self._failure is None or isinstance(self._failure, NotAnsweredError)):
            self._failure = error
