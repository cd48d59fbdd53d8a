"""The mode for `--batch IN --out OUT`: a batch on one's own machine, with a progress bar."""

import asyncio
import hashlib
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvloop

from worker import modes, race
from worker.batch.files import Files
from worker.batch.job import Batch
from worker.batch.journal import Journal
from worker.batch.source import Source
from worker.batch.spec import BatchSpec
from worker.errors import ConfigurationError, EngineDiedError, JobError, Json
from worker.worker import Worker

BAR_SECONDS = 0.5
NOTE_SECONDS = 2.0


class BatchMode(modes.Mode):
    """A file of requests, whose results become a file. The same command goes on with a batch that was stopped."""

    ends_by_itself = True
    stops_with_0 = False

    def __init__(self, worker: Worker, source: Path, output: Path) -> None:
        super().__init__(worker)
        self._source = source
        self._output = output
        self._key = ""

    def load(self) -> None:
        """Check both files, which takes no time, and load the engine."""
        try:
            Source.from_file(self._source, self.worker.settings.max_request_bytes).check()
            with self._source.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
            # The results of another model are those of another batch.
            digest.update(f"{self.worker.settings.model_name} {self.worker.settings.model_revision}".encode())
            self._key = digest.hexdigest()[:32]
            journal = Journal.open(self._output, self._key)
        except JobError as error:
            raise ConfigurationError(f"--batch {self._source} --out {self._output}: {error}") from None
        journal.close()
        self.worker.load()

    def serve(self) -> int:
        """Answer the lines and print a summary; the exit code is 1 if the batch could not be completed."""
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(self._answer())

    async def _answer(self) -> int:
        worker, stopping = self.worker, self.worker.lifecycle.stopping
        app = await worker.attach()
        spec = BatchSpec(input=str(self._source), output=str(self._output))
        files = Files(self._key, "path", self._source, self._output)
        batch = Batch(self._output.name, spec, modes.shared_by_batches(worker, app), files)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._note_stop, number)
        running, dying = asyncio.ensure_future(batch.run()), asyncio.ensure_future(worker.engine.died())
        try:
            with _bar(batch) as show:
                while not (running.done() or dying.done() or stopping.is_set()):
                    await race.first(running, dying, stopping.wait(), asyncio.sleep(BAR_SECONDS))
                    show()
            if dying.done():
                # The batch notes which lines were in flight.
                await asyncio.wait([running], timeout=NOTE_SECONDS)
                raise EngineDiedError
            # A stopped batch is not cut: its journal is kept. The lines in flight are asked again the next time.
            return self._report(running if running.done() else None)
        finally:
            stopping.set()
            await race.end(running, dying)

    def _note_stop(self, number: int) -> None:
        self.stopped_by = self.stopped_by or number
        self.worker.lifecycle.stopping.set()

    def _report(self, ended: "asyncio.Future[Json] | None") -> int:
        """Print how the batch ended, and return the exit code."""
        error = ended.exception() if ended else None
        if ended and error is None:
            sys.stdout.write(f"{_summary(ended.result())}\n")
            return 0
        if error and not isinstance(error, JobError):
            raise error
        reason = str(error) if error else "The batch was stopped."
        sys.stderr.write(f"{reason} The results so far are kept. The same command goes on from there.\n")
        return self.exit_code if self.stopped_by else 1


@contextmanager
def _bar(batch: Batch) -> Iterator[Callable[[], None]]:
    """Show a progress bar on a terminal. The yielded function updates it."""
    from tqdm import tqdm

    with tqdm(unit=" lines", disable=None, dynamic_ncols=True) as bar:

        def show() -> None:
            if state := batch.state:
                bar.total, bar.n = state.total, state.counts.done
                bar.set_postfix_str(f"{state.tokens_per_second:.0f} tokens/s, {state.counts.failed} failed")

        yield show


def _summary(output: Json) -> str:
    """Return the result of a batch in one line."""
    tokens = output["tokens"]
    return (
        f"{output['total']:,} lines: {output['completed']:,} completed, {output['failed']:,} failed; "
        f"{tokens['input']:,} tokens in, {tokens['output']:,} out; {output['seconds']:.1f} s; results in "
        f"{output['output']}"
    )
