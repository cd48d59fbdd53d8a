"""One job from its input to its last yield: parse → call the engine → frame → yield."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeVar

from worker.errors import (
    ENGINE_DIED,
    EngineResponseError,
    InternalError,
    JobError,
    JobTimeoutError,
    Json,
    NotOfThisModelError,
    UnavailableError,
)
from worker.request import inputs as jobs
from worker.request import sse
from worker.request.asgi import App, Request, Response, exchange
from worker.request.pace import Pace, paced
from worker.settings.settings import Settings
from worker.telemetry.jobs import Record, Telemetry
from worker.telemetry.logs import frames

T = TypeVar("T")
Job = dict[str, Any]
Output = str | Json | list[Any]
Handler = Callable[[Job], AsyncGenerator[Output, None]]

log = logging.getLogger(__name__)


class Service:
    """Answers jobs through an engine's ASGI app, which `attach` gives once the event loop runs.

    What the engine says of its own death, as `is_dead` tells, is put in words that a caller can act on.
    """

    def __init__(
        self,
        attach: Callable[[], Awaitable[App]],
        settings: Settings,
        telemetry: Telemetry,
        is_dead: Callable[[], bool] = lambda: False,
    ) -> None:
        self._attach = attach
        self._settings = settings
        self._telemetry = telemetry
        self._is_dead = is_dead
        self._limits: set[_Limit] = set()
        self._ended: JobError | None = None

    def end(self, error: JobError) -> None:
        """End every job that runs, and every one that comes, with an error."""
        self._ended = error
        for limit in self._limits:
            limit.expire(error)

    async def handler(self, job: Job) -> AsyncGenerator[Output, None]:
        """Yield a job's output; RunPod's generator handler.

        Not streaming: one value, the engine's body. Streaming: SSE text for `openai_route`, else lists of chunk
        objects. The last yield of a job that failed is `{"error": JSON text}`, by which the SDK marks it FAILED;
        where the caller reads SSE text it is an error event, since the stream is all that RunPod's proxy relays.
        """
        job_input = job.get("input")
        form = jobs.stream_form(job_input)
        with self._telemetry.job(str(job.get("id"))) as record:
            try:
                async with aclosing(self._answer(job_input, form, record)) as outputs:
                    async for output in outputs:
                        yield output
            except JobError as told:
                error = UnavailableError(ENGINE_DIED) if told.http_status >= 500 and self._is_dead() else told
                record.ended_with(error.http_status)
                for output in _failure(error, form):
                    yield output
            except Exception as error:  # noqa: BLE001 - the job's boundary
                record.ended_with(InternalError.status)
                log.error("Job %s failed:\n%s", record.request_id, frames(error))
                for output in _failure(InternalError(record.request_id), form):
                    yield output

    async def _answer(
        self, job_input: object, form: jobs.StreamForm | None, record: Record
    ) -> AsyncGenerator[Output, None]:
        if self._ended is not None:
            raise self._ended
        call = jobs.parse(job_input, self._settings.allow_control_routes)
        record.path = call.path
        limit = _Limit(self._settings.request_timeout)
        self._limits.add(limit)
        async with AsyncExitStack() as stack:
            stack.callback(self._limits.remove, limit)
            app = await self._attach()
            paced.set(Pace(self._settings.stream_batch_ms / 1000) if self._settings.stream_batch_ms else None)
            opening = exchange(app, _request(call, record))
            response = await limit.apply(stack.enter_async_context(opening))
            if response.status >= 400:
                raise _error(response.status, await response.read_all(), call.path)
            record.stream = response.is_event_stream
            if not record.stream:
                yield _value(response, await limit.apply(response.read_all()))
                record.ended_with(response.status)
                return
            status = response.status
            async for batch in _batches(response, limit):
                if form == "sse":
                    status = sse.status_of(batch) or status
                    if status >= 500 and self._is_dead():
                        raise UnavailableError(ENGINE_DIED)
                    for text in sse.pieces(b"".join(batch).decode()):
                        yield text
                    continue
                chunks, error = _chunks(batch)
                if chunks:
                    yield chunks
                if error:
                    raise error
            record.ended_with(status)


class _Limit:
    """Ends what a job waits for when its time is up. It never spans a yield, at which others' code would run."""

    def __init__(self, seconds: float | None) -> None:
        self._error: JobError | None = None if seconds is None else JobTimeoutError(seconds)
        self._deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds
        self._waiting: asyncio.Timeout | None = None

    def expire(self, error: JobError) -> None:
        """Have the time be up now, with an error that says why."""
        self._error, self._deadline = error, asyncio.get_running_loop().time()
        if self._waiting is not None and not self._waiting.expired():
            self._waiting.reschedule(self._deadline)

    async def apply(self, work: Awaitable[T]) -> T:
        """Return the result of `work`.

        Raises:
            JobError: there is none in time.
        """
        try:
            async with asyncio.timeout_at(self._deadline) as waiting:
                self._waiting = waiting
                return await work
        except TimeoutError:
            if self._error is None or not waiting.expired():
                raise
            raise self._error from None
        finally:
            self._waiting = None


async def _batches(response: Response, limit: _Limit) -> AsyncIterator[list[bytes]]:
    """Yield the stream's events in batches: each holds what has come while the one before was being posted."""
    splitter = sse.EventSplitter()
    while data := await limit.apply(response.read()):
        for batch in sse.batches(splitter.feed(data)):
            yield batch
    for batch in sse.batches(splitter.flush()):
        yield batch


def _chunks(batch: list[bytes]) -> tuple[list[Any], EngineResponseError | None]:
    """Return the batch's chunk objects up to the engine's error, and that error, if there is one."""
    chunks: list[Any] = []
    for event in batch:
        if (chunk := sse.payload(event)) is None:
            continue
        if error := _engine_error(200, chunk):
            return chunks, error
        chunks.append(chunk)
    return chunks, None


def _request(call: jobs.ApiCall, record: Record) -> Request:
    headers = {"x-request-id": record.request_id, **record.trace_headers}
    if call.body is None:
        return Request(call.method, call.path, call.query, headers)
    body = json.dumps(call.body).encode()
    return Request(call.method, call.path, call.query, headers | {"content-type": "application/json"}, body)


def _value(response: Response, body: bytes) -> Output:
    """Return a body as what it is: JSON, text such as the metrics, or, when it is empty, its status.

    Raises:
        EngineResponseError: the engine tells an error with status 200, as `/v1/responses` does.
    """
    if not body:
        return {"status": response.status}
    if not response.headers.get("content-type", "").startswith("application/json"):
        return body.decode()
    value: Output = json.loads(body)
    if error := _engine_error(response.status, value):
        raise error
    return value


def _engine_error(status: int, value: object) -> EngineResponseError | None:
    """Return the error that a body or a chunk tells, if it does; the status within it counts when HTTP's was 200."""
    if not isinstance(value, dict) or not isinstance(value.get("error"), dict):
        return None
    return EngineResponseError(status if status >= 400 else value["error"].get("code", 500), value)


def _error(status: int, body: bytes, path: str) -> JobError:
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    if status == NotOfThisModelError.status and value == {"detail": "Not Found"}:
        return NotOfThisModelError(path)
    told = body.decode(errors="replace") or f"The engine answered with HTTP status {status}."
    return _engine_error(status, value) or EngineResponseError(status, {"error": {"message": told}})


def _failure(error: JobError, form: jobs.StreamForm | None) -> list[Output]:
    """Return the last yields of a job that failed."""
    if form == "sse":
        body = error.body()
        # Anthropic's clients tell an error by the event's name, OpenAI's by its data.
        name = "error" if body.get("type") == "error" else None
        return [(sse.event(body, name) + sse.DONE).decode()]
    failed: Json = {"error": json.dumps(error.error(), ensure_ascii=False)}
    return [[error.body()], failed] if form == "objects" else [failed]
