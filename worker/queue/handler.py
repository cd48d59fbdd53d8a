"""RunPod's handler: a job's input → one request through the pipeline → yields."""

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, closing
from typing import Any

from worker import race
from worker.batch.spec import FIELD, is_batch
from worker.errors import EngineResponseError, InvalidRequestError, JobError, Json, status_of
from worker.queue.batch_jobs import BatchJobs
from worker.queue.outputs import Output
from worker.request import sse
from worker.request.asgi import App, Message, Receive, Request, Response, Send, exchange
from worker.request.inputs import JobInput, StreamForm
from worker.request.links import LinkedInputs, has_link
from worker.request.pace import Pace, current_pace
from worker.request.pipeline import Pipeline, only_job_errors
from worker.settings import Settings

Job = dict[str, Any]
Handler = Callable[[Job], AsyncGenerator[Output, None]]

UPLOAD_URL = "upload_url"
"""The field of a job's input with the link to which a result is uploaded that is too large for the platform."""


class JobHandler:
    """Answers jobs with an ASGI app: the engine's, or another one with the same routes.

    Without `links`, inputs behind links are not accepted; without `batches`, no batches.
    """

    def __init__(
        self,
        app: App,
        pipeline: Pipeline,
        settings: Settings,
        links: LinkedInputs | None = None,
        batches: BatchJobs | None = None,
    ) -> None:
        self._app = pipeline.around(app)
        self._pipeline = pipeline
        self._settings = settings
        self._links = links
        self._batches = batches
        self._streams = 0
        """The number of streams that run."""

    async def handle(self, job: Job) -> AsyncGenerator[Output, None]:
        """Yield a job's output.

        Without streaming this is one value: the engine's body. With streaming it is SSE text for `openai_route`, and
        lists of chunk objects for the other inputs, or SSE text with `RAW_STREAM_OUTPUT`. A job that failed ends with
        `{"error": JSON text}`, by which the SDK marks it FAILED. A stream for `openai_route` ends with an error event
        instead, because RunPod's proxy passes on nothing but the stream. A batch yields its progress, too.
        """
        job_id = str(job.get("id"))
        form: StreamForm | None = None
        try:
            with only_job_errors(job_id):
                if self._batches is not None and is_batch(job.get("input")):
                    batch = self._batches.outputs(job_id, _without_upload_url(job["input"]))
                    async with aclosing(batch) as progress_and_output:
                        async for each in progress_and_output:
                            yield each
                    return
                job_input = await self._input(job.get("input"))
                form = self._stream_form(job_input)
                async with aclosing(self._outputs(job_id, job_input, form)) as outputs:
                    async for output in outputs:
                        yield output
        except JobError as error:
            for output in _failure(error, form):
                yield output

    async def _input(self, value: Any) -> JobInput:
        """Return a job's input, fetched if it is behind a link. This is like an upload: no timeout runs yet."""
        try:
            value = _without_upload_url(value)
            if self._links is not None and has_link(value):
                value = await self._fetched(self._links, value)
                if UPLOAD_URL in value:
                    raise InvalidRequestError(
                        "'upload_url' must stand beside 'input_url', not in the file behind the link.", param=UPLOAD_URL
                    )
                if is_batch(value):
                    raise InvalidRequestError(
                        "'batch' must stand in the job's own input. Its 'input' may be a link.", param=FIELD
                    )
        except JobError as error:
            return JobInput(value, error)
        return JobInput(value)

    async def _fetched(self, links: LinkedInputs, value: Json) -> Json:
        with closing(self._pipeline.memory.account()) as account:
            fetching = asyncio.ensure_future(links.resolve(value, account.take))
            try:
                await race.first(fetching, self._pipeline.lifecycle.over.wait())
                # Once the worker's life is over, the pipeline answers every request with the reason.
                return fetching.result() if fetching.done() else value
            finally:
                await race.end(fetching)

    def _stream_form(self, job_input: JobInput) -> StreamForm | None:
        form = job_input.stream_form
        return "text" if form == "objects" and self._settings.raw_stream_output else form

    async def _outputs(self, job_id: str, job_input: JobInput, form: StreamForm | None) -> AsyncGenerator[Output, None]:
        app, request = self._prepared(job_id, job_input)
        milliseconds = self._settings.stream_batch_ms
        current_pace.set(Pace(milliseconds / 1000, lambda: self._streams) if milliseconds else None)
        async with exchange(app, request) as response, self._counted(form):
            if response.status >= 400:
                raise _error(response.status, await response.read_all())
            if not response.is_event_stream:
                yield _value(response, await response.read_all())
                return
            async for events in _events(response):
                if form in ("sse", "text"):
                    for text in sse.texts(events):
                        yield text
                    continue
                for batch in sse.batches(events):
                    chunks, error = _chunks(batch)
                    if chunks:
                        yield chunks
                    if error:
                        raise error

    @asynccontextmanager
    async def _counted(self, form: StreamForm | None) -> AsyncIterator[None]:
        self._streams += form is not None
        try:
            yield
        finally:
            self._streams -= form is not None

    def _prepared(self, job_id: str, job_input: JobInput) -> tuple[App, Request]:
        """Return the app and the request for a job. The app for invalid input answers with the error."""
        headers = {"x-request-id": job_id}
        try:
            call = job_input.call(self._settings.allow_control_routes)
        except JobError as error:
            return self._pipeline.around(_failing_with(error)), Request("POST", "", "", headers)
        if call.body is None:
            return self._app, Request(call.method, call.path, call.query, headers)
        headers["content-type"] = "application/json"
        return self._app, Request(call.method, call.path, call.query, headers, json.dumps(call.body).encode())


def _without_upload_url(value: Any) -> Any:
    """Return a job's input without `upload_url`, which is not for the engine."""
    if not isinstance(value, dict) or UPLOAD_URL not in value:
        return value
    if not isinstance(value[UPLOAD_URL], str | None):
        raise InvalidRequestError("'upload_url' must be a string: a link presigned for PUT.", param=UPLOAD_URL)
    return {name: item for name, item in value.items() if name != UPLOAD_URL}


def _failing_with(error: JobError) -> App:
    async def app(_scope: Message, _receive: Receive, _send: Send) -> None:
        raise error

    return app


async def _events(response: Response) -> AsyncIterator[bytes]:
    """Yield the stream in whole events: each time all that arrived while the caller was busy with the last ones."""
    buffer = sse.EventBuffer()
    while data := await response.read():
        if events := buffer.feed(data):
            yield events
    if rest := buffer.flush():
        yield rest


def _chunks(events: bytes) -> tuple[list[Any], EngineResponseError | None]:
    """Return the chunk objects up to the engine's error, and that error, if there is one."""
    chunks: list[Any] = []
    for event in sse.split(events):
        if (chunk := sse.payload(event)) is None:
            continue
        if error := _engine_error(200, chunk):
            return chunks, error
        chunks.append(chunk)
    return chunks, None


def _value(response: Response, body: bytes) -> Output:
    """Return a body as JSON; text, such as the metrics, as it is; other data, such as embeddings, in base64.

    An empty body becomes its status. The header `metadata` describes the data.

    Raises:
        EngineResponseError: the body is an error that was sent with status 200, as `/v1/responses` does.
    """
    if not body:
        return {"status": response.status}
    content_type = response.headers.get("content-type", "")
    if content_type.startswith("text/"):
        return body.decode(errors="replace")
    if not content_type.startswith("application/json"):
        metadata = json.loads(response.headers.get("metadata", "null"))
        return {"content_type": content_type, "metadata": metadata, "base64": base64.b64encode(body).decode()}
    value: Output = json.loads(body)
    if error := _engine_error(response.status, value):
        raise error
    return value


def _engine_error(status: int, value: object) -> EngineResponseError | None:
    """Return the error that a body or a chunk holds, if any. With status 200, the error's own code is its status."""
    code = status_of(value)
    if code is None or not isinstance(value, dict):
        return None
    return EngineResponseError(status if status >= 400 else code, value)


def _error(status: int, body: bytes) -> JobError:
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    message = body.decode(errors="replace") or f"The engine answered with HTTP status {status}."
    return _engine_error(status, value) or EngineResponseError(status, {"error": {"message": message}})


def _failure(error: JobError, form: StreamForm | None) -> list[Output]:
    """Return the last yields of a failed job."""
    body = error.body()
    # Anthropic's clients recognise an error by the event's name, OpenAI's by its data.
    events = (sse.event(body, "error" if body.get("type") == "error" else None) + sse.DONE).decode()
    if form == "sse":
        return [events]
    failed: Json = {"error": json.dumps(error.error(), ensure_ascii=False)}
    last_in_stream: dict[StreamForm | None, list[Output]] = {"objects": [[body]], "text": [events]}
    return [*last_in_stream.get(form, []), failed]
