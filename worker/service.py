"""One job from its input to its last yield: parse → call the engine → frame → yield."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeVar

from worker import jobs, sse
from worker.asgi import App, Request, Response, exchange
from worker.config import Settings
from worker.errors import EngineResponseError, InternalError, JobError, JobTimeoutError, Json
from worker.pace import Pace, paced
from worker.usage import Meter, metered

T = TypeVar("T")
Job = dict[str, Any]
Output = str | Json | list[Any]

log = logging.getLogger(__name__)


class Service:
    """Answers jobs through an engine's ASGI app, which `attach` gives once the event loop runs."""

    def __init__(self, attach: Callable[[], Awaitable[App]], settings: Settings) -> None:
        self._attach = attach
        self._settings = settings

    async def handler(self, job: Job) -> AsyncGenerator[Output, None]:
        """Yield a job's output; RunPod's generator handler.

        Not streaming: one value, the engine's body. Streaming: SSE text for `openai_route`, else lists of chunk
        objects. The last yield of a job that failed is `{"error": JSON text}`, by which the SDK marks it FAILED;
        where the caller reads SSE text it is an error event, since the stream is all that RunPod's proxy relays.
        """
        request_id = str(job.get("id"))
        form = jobs.stream_form(job.get("input"))
        started = time.monotonic()
        meter = Meter()
        outcome = "cancelled"
        try:
            async with aclosing(self._answer(job.get("input"), form, request_id, meter)) as outputs:
                async for output in outputs:
                    yield output
            outcome = "ok"
        except JobError as error:
            outcome = f"failed, {error.error()['code']} {error.error()['type']}"
            for output in _failure(error, form):
                yield output
        except Exception:
            outcome = "failed"
            log.exception("Job %s failed", request_id)
            for output in _failure(InternalError(request_id), form):
                yield output
        finally:
            used = meter.read()
            log.info(
                "Job %s %s after %.3f s, %d tokens in, %d out",
                request_id,
                outcome,
                time.monotonic() - started,
                used.prompt_tokens,
                used.completion_tokens,
            )

    async def _answer(
        self, job_input: object, form: jobs.StreamForm | None, request_id: str, meter: Meter
    ) -> AsyncGenerator[Output, None]:
        call = jobs.parse(job_input, self._settings.allow_control_routes)
        limit = _TimeLimit(self._settings.request_timeout)
        async with AsyncExitStack() as stack:
            app = await self._attach()
            metered.set(meter)
            paced.set(Pace(self._settings.stream_batch_ms / 1000) if self._settings.stream_batch_ms else None)
            opening = exchange(app, _request(call, request_id))
            response = await limit.apply(stack.enter_async_context(opening))
            if response.status >= 400:
                raise _error(response.status, await response.read_all())
            if not response.is_event_stream:
                yield _value(response, await limit.apply(response.read_all()))
                return
            async for batch in _batches(response, limit):
                if form == "sse":
                    yield b"".join(batch).decode()
                    continue
                chunks, error = _chunks(batch)
                if chunks:
                    yield chunks
                if error:
                    raise error


class _TimeLimit:
    """Ends what a job waits for when its time is up. It never spans a yield, at which others' code would run."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds

    async def apply(self, work: Awaitable[T]) -> T:
        """Return the result of `work`.

        Raises:
            JobTimeoutError: there is none in time.
        """
        try:
            async with asyncio.timeout_at(self._deadline):
                return await work
        except TimeoutError:
            if self._seconds is None:
                raise
            raise JobTimeoutError(self._seconds) from None


async def _batches(response: Response, limit: _TimeLimit) -> AsyncIterator[list[bytes]]:
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


def _request(call: jobs.ApiCall, request_id: str) -> Request:
    headers = {"x-request-id": request_id}
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


def _error(status: int, body: bytes) -> JobError:
    try:
        value = json.loads(body)
    except ValueError:
        value = None
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
