"""Asks the engine one line of a batch: one request through the same pipeline as all others."""

import asyncio
import base64
import json
from itertools import chain, repeat

from worker.batch import results
from worker.batch.lines import Line
from worker.batch.runner import NotAnsweredError
from worker.errors import BusyError, InternalError, Json, MediaBusyError, status_of
from worker.request.asgi import App, IncompleteResponseError, Request, exchange
from worker.request.pipeline import IS_LINE, Pipeline
from worker.telemetry.usage import Usage, current_usage

PRIORITY_HEADER = "x-vllm-priority"
"""vLLM's header for the priority of a request. The body stays as the caller wrote it."""
BUSY_SECONDS = (1.0, 5.0, 20.0)
"""The pauses before a line that found no memory is asked again. The last one repeats: nobody waits for a line."""
NO_ANSWER = (500, 503)


class Asker:
    """Asks the lines of one batch. `priority` is sent only to an engine that schedules by it."""

    def __init__(self, app: App, pipeline: Pipeline, key: str, priority: int | None) -> None:
        self._app = pipeline.around(app)
        self._lifecycle = pipeline.lifecycle
        self._key = key
        self._headers = {"content-type": "application/json"}
        if priority is not None:
            self._headers[PRIORITY_HEADER] = str(priority)

    async def ask(self, line: Line) -> tuple[int, Json]:
        """Return the status and the body of the answer, which may be an error.

        Raises:
            NotAnsweredError: the worker stops, or its engine has died.
        """
        pauses = chain(BUSY_SECONDS, repeat(BUSY_SECONDS[-1]))
        while True:
            status, body = await self._ask(line)
            if status != BusyError.status or not _is_busy(body):
                return status, body
            await asyncio.sleep(next(pauses))

    async def _ask(self, line: Line) -> tuple[int, Json]:
        # Each line is a task of its own. Without this, all lines would count towards the usage of their job.
        current_usage.set(Usage())
        request_id = results.result_id(self._key, line.number)
        headers = {**self._headers, "x-request-id": request_id}
        request = Request("POST", line.path, line.query, headers, line.body, {IS_LINE: True})
        try:
            async with exchange(self._app, request) as response:
                data = await response.read_all()
        except IncompleteResponseError:
            status, answer = InternalError.status, InternalError(request_id).body()
        else:
            status, answer = _answer(response.status, response.headers.get("content-type", ""), data)
        if status in NO_ANSWER and self._lifecycle.state != "ready":
            raise NotAnsweredError
        return status, answer


def _is_busy(body: Json) -> bool:
    error = body.get("error")
    return isinstance(error, dict) and error.get("type") in (BusyError.type, MediaBusyError.type)


def _answer(status: int, content_type: str, data: bytes) -> tuple[int, Json]:
    """Return the status and the body of a response: JSON as it is, text and other data as an object."""
    if content_type.startswith("application/json"):
        value = json.loads(data)
        # `/v1/responses` sends errors with status 200.
        return (status_of(value) or status if status < 400 else status), value
    if content_type.startswith("text/"):
        return status, {"content_type": content_type, "text": data.decode(errors="replace")}
    return status, {"content_type": content_type, "base64": base64.b64encode(data).decode()}
