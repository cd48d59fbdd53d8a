"""Delivers one job's outputs: each as a part of its stream, then all of them as its result."""

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from worker.errors import Json, ResultRefusedError
from worker.queue.handler import Job
from worker.queue.platform import Platform, encoded

StoreResult = Callable[[Job, bytes, ResultRefusedError], Awaitable[Json]]
"""Stores a job's outputs, as JSON, that the platform has refused, and returns what takes their place; or raises."""

log = logging.getLogger(__name__)


async def store_nothing(_job: Job, _data: bytes, refusal: ResultRefusedError) -> Json:
    """Store nothing."""
    raise refusal


class Delivery:
    """The outputs of one job. Call its methods one at a time. They raise `JobLostError` once nobody waits for the job.

    `posted` is called for every part of the stream that the platform has taken, and `store` with outputs that it has
    refused.
    """

    def __init__(
        self, platform: Platform, job: Job, posted: Callable[[], None], store: StoreResult = store_nothing
    ) -> None:
        self._platform = platform
        self._job = job
        self._job_id: str = job["id"]
        self._posted = posted
        self._store = store
        self._streams = True
        self.outputs: list[Any] = []

    async def part(self, output: Any) -> None:
        """Post one output, unless an earlier one was refused: a stream with a hole is worse than one that ends."""
        self.outputs.append(output)
        if not self._streams:
            return
        try:
            await self._platform.stream(self._job_id, output)
        except ResultRefusedError as error:
            log.warning("Job %s: the rest comes with the result, not in the stream. %s", self._job_id, error)
            self._streams = False
        else:
            self._posted()

    async def done(self) -> None:
        """Post all outputs as the result, or where they are if they are too large."""
        await self._end(self._post_outputs())

    async def failed(self, reason: str) -> None:
        """Post an error as the result."""
        await self._end(self._platform.done(self._job_id, encoded({"error": reason})))

    async def _post_outputs(self) -> None:
        # The encoding of a large result takes a while. It is needed once, whether RunPod accepts it or not.
        outputs = encoded(self.outputs)
        try:
            await self._platform.done(self._job_id, b'{"output":%b}' % outputs)
        except ResultRefusedError as refusal:
            if not refusal.may_be_stored:
                raise
            stored = await self._store(self._job, outputs, refusal)
            await self._platform.done(self._job_id, encoded({"output": stored}))

    async def _end(self, posting: Awaitable[None]) -> None:
        """Post a result. If the platform refuses it, the job fails with the reason."""
        try:
            await posting
        except ResultRefusedError as refusal:
            log.warning("Job %s fails: %s", self._job_id, refusal)
            try:
                await self._platform.done(self._job_id, encoded({"error": json.dumps(refusal.error())}))
            except ResultRefusedError as error:
                log.error("Job %s has no result: its error was refused too: %s", self._job_id, error)
