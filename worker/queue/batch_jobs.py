"""Jobs that ask for a batch: progress while it runs, then one output."""

import asyncio
from collections.abc import AsyncGenerator

from worker import race
from worker.batch import spec
from worker.batch.job import Batch, Shared
from worker.errors import JobError, Json
from worker.queue.outputs import Left, Output, Progress

FIRST_SECONDS = 1.0
PROGRESS_SECONDS = 5.0
"""How soon the progress is posted for the first time, and how often after that."""


class BatchJobs:
    """Answers the jobs that ask for a batch."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared

    async def outputs(self, job_id: str, job_input: Json) -> AsyncGenerator[Output, None]:
        """Yield the progress every few seconds, and the output at the end.

        If the worker stops, a batch that another worker can go on with is left to the platform.

        Raises:
            JobError: the batch cannot run, or the worker stops.
        """
        batch = Batch(job_id, spec.read(job_input), self._shared)
        running, seconds = asyncio.ensure_future(batch.run()), FIRST_SECONDS
        try:
            while not (await asyncio.wait([running], timeout=seconds))[0]:
                seconds = PROGRESS_SECONDS
                yield Progress(batch.progress())
            yield running.result()
        except JobError as error:
            if not batch.is_stopped or not (batch.is_kept or self._shared.settings.unfinished_jobs == "leave"):
                raise
            yield Left(str(error))
        finally:
            await race.end(running)
