"""Appends results to a journal in threads. Results that arrive during a write are written together by the next one."""

import asyncio
from concurrent.futures import Executor

from worker import threads
from worker.batch.journal import Journal

SYNC_SECONDS = 1.0
"""How often the journal is forced onto the disk. A loss of power loses no more; a killed process loses nothing."""


class Writer:
    """Writes the results of one run."""

    def __init__(self, journal: Journal, executor: Executor) -> None:
        self._journal = journal
        self._executor = executor
        self._pending: list[bytes] = []
        self._next: asyncio.Task[None] | None = None
        """Writes what is pending, once `_last` has ended."""
        self._last: asyncio.Task[None] | None = None
        self._sync: asyncio.Future[None] | None = None
        self._synced = 0.0

    async def add(self, line: bytes) -> None:
        """Return once this result is in the file. Of an `add` that is cancelled, the result is written all the same.

        Raises:
            JobError: the disk is full or fails. After that nothing more is written.
        """
        self._pending.append(line)
        if self._next is None:
            self._next = asyncio.create_task(self._write(self._last))
        await asyncio.shield(self._next)

    async def close(self) -> None:
        """Wait until everything is written.

        Raises:
            JobError: the disk is full or fails.
        """
        for running in (self._next or self._last, self._sync):
            if running:
                await running

    async def _write(self, last: "asyncio.Task[None] | None") -> None:
        if last:
            await last
        lines, self._pending = self._pending, []
        self._last, self._next = self._next, None
        await threads.call(self._executor, self._journal.write, lines)
        self._sync_if_due()

    def _sync_if_due(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._synced < SYNC_SECONDS or not (self._sync is None or self._sync.done()):
            return
        if self._sync:
            self._sync.result()
        self._synced = now
        self._sync = asyncio.ensure_future(threads.call(self._executor, self._journal.sync))
