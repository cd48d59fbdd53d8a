"""OpenAI's routes for files and batches: `/v1/files` and `/v1/batches`. Each API key sees its own."""

import logging
import re
import time
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import islice

from pydantic import ValidationError
from starlette.datastructures import QueryParams
from starlette.responses import FileResponse, JSONResponse, Response

from worker import threads
from worker.batch.incoming import Incoming
from worker.batch.objects import BatchObject, BatchRequest, Expiry, new_key
from worker.batch.service import BatchService
from worker.batch.store import PUBLIC, Kind, in_words, owner_of
from worker.errors import (
    BatchBusyError,
    BatchesOffError,
    BusyError,
    InvalidRequestError,
    JobError,
    Json,
    MethodNotAllowedError,
    RouteNotFoundError,
    UploadTooLargeError,
)
from worker.http.forms import FORM_BYTES, Form, pieces
from worker.request.asgi import App, ClientDisconnectedError, Message, Receive, Send, header
from worker.request.pipeline import only_job_errors, send_error
from worker.settings import Settings

KEY_INDEX = "worker.key_index"
"""In the state of a request's scope: which one of the API keys in the settings the caller has."""
UPLOADS = 8
"""The most uploads at once."""
WRITE_BYTES = 1 << 20
FILE_SETTING = "MAX_BATCH_FILE_BYTES"
PAGES: dict[Kind, tuple[int, int]] = {"files": (10_000, 10_000), "batches": (20, 100)}
"""The default and the largest number of objects in one answer."""

_PATH = re.compile(r"/v1/(files|batches)(?:/([^/]+)(?:/(content|cancel))?)?")

Handler = Callable[["Call"], Awaitable[Response]]

log = logging.getLogger(__name__)


def is_batch_route(path: str) -> bool:
    """Return whether a path is about files or batches."""
    return _PATH.fullmatch(path) is not None


def routes(service: BatchService | None, settings: Settings) -> App:
    """Return the routes as an ASGI app. Without a service they answer 404, and say which setting is missing."""
    return BatchRoutes(service, settings) if service else off


async def off(scope: Message, _receive: Receive, send: Send) -> None:
    """Answer these routes of a worker without `BATCH_FOLDER`. An ASGI app."""
    await send_error(send, BatchesOffError(scope["path"]))


class Call:
    """One request. `name` is the id in its path."""

    def __init__(self, scope: Message, receive: Receive, owner: str, name: str) -> None:
        self.scope = scope
        self.receive = receive
        self.owner = owner
        self.name = name

    async def body(self) -> bytes:
        """Return the body, which must be small."""
        return b"".join([piece async for piece in pieces(self.receive, FORM_BYTES)])


class BatchRoutes:
    """The routes as an ASGI app."""

    def __init__(self, service: BatchService, settings: Settings) -> None:
        self._service = service
        self._store = service.store
        self._file_limit = settings.max_batch_file_bytes
        self._uploads = 0
        self._call = partial(threads.call, self._store.threads)
        self._keys = list(settings.api_keys)
        self._owners: dict[int | None, str] = {None: PUBLIC}
        self._handlers: dict[tuple[str, bool, str | None], dict[str, Handler]] = {
            ("files", False, None): {"GET": self._list_files, "POST": self._upload},
            ("files", True, None): {"GET": self._file, "DELETE": self._delete},
            ("files", True, "content"): {"GET": self._content},
            ("batches", False, None): {"GET": self._list_batches, "POST": self._create},
            ("batches", True, None): {"GET": self._batch},
            ("batches", True, "cancel"): {"POST": self._cancel},
        }

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            with only_job_errors(header(scope, b"x-request-id").decode("latin-1")):
                handler, name = self._handler(scope["method"], scope["path"])
                owner = await self._owner(scope["state"].get(KEY_INDEX))
                response = await handler(Call(scope, receive, owner, name))
        except JobError as error:
            return await send_error(send, error)
        except ClientDisconnectedError:
            return None
        return await response(scope, receive, send)

    def _handler(self, method: str, path: str) -> tuple[Handler, str]:
        found = _PATH.fullmatch(path)
        assert found is not None
        kind, name, action = found.groups()
        if (methods := self._handlers.get((kind, name is not None, action))) is None:
            raise RouteNotFoundError(path, ("/v1/files/{id}/content", "/v1/batches/{id}/cancel"))
        if method not in methods:
            raise MethodNotAllowedError(method, ", ".join(methods), path)
        return methods[method], name or ""

    async def _owner(self, index: int | None) -> str:
        if index is not None and index not in self._owners:
            self._owners[index] = await self._call(owner_of, self._keys[index])
        return self._owners[index]

    # ---- Files

    async def _upload(self, call: Call) -> Response:
        form, declared = Form(header(call.scope, b"content-type").decode("latin-1")), _content_length(call.scope)
        if declared > self._file_limit + FORM_BYTES:
            raise UploadTooLargeError(self._file_limit, FILE_SETTING)
        if self._uploads >= UPLOADS:
            raise BusyError(f"The worker receives {self._uploads} files, as many as it can. Try again in a second.")
        self._uploads += 1
        try:
            await self._call(self._store.make_room, call.owner, "files", declared)
            incoming = await self._call(Incoming, self._store, call.owner)
            try:
                await self._receive_file(call, form, incoming)
                seconds = _lifetime(form.fields, self._store.keep_seconds)
                file = await self._call(incoming.keep, form.filename or "", seconds)
            finally:
                await self._call(incoming.discard)
        finally:
            self._uploads -= 1
        return JSONResponse(file.public())

    async def _receive_file(self, call: Call, form: Form, incoming: Incoming) -> None:
        buffer, size = bytearray(), 0
        async for piece in pieces(call.receive, self._file_limit + FORM_BYTES, FILE_SETTING):
            content = form.feed(piece)
            buffer += content
            size += len(content)
            if size > self._file_limit:
                raise UploadTooLargeError(self._file_limit, FILE_SETTING)
            if len(buffer) >= WRITE_BYTES:
                await self._call(incoming.write, bytes(buffer))
                buffer.clear()
        await self._call(incoming.write, bytes(buffer))
        form.check_complete()

    async def _list_files(self, call: Call) -> Response:
        query = QueryParams(call.scope["query_string"].decode("latin-1"))
        purpose = query.get("purpose", "")
        return JSONResponse(await self._call(self._page, call.owner, "files", query, purpose))

    async def _file(self, call: Call) -> Response:
        file = await self._call(self._store.file, call.owner, call.name)
        return JSONResponse(file.public())

    async def _content(self, call: Call) -> Response:
        file = await self._call(self._store.file, call.owner, call.name)
        path = self._store.content(call.owner, file.id)
        with in_words():
            status = await self._call(path.stat)
        headers = {"x-content-type-options": "nosniff"}
        return FileResponse(
            path, headers=headers, media_type="application/octet-stream", filename=file.filename, stat_result=status
        )

    async def _delete(self, call: Call) -> Response:
        await self._call(self._store.delete_file, call.owner, call.name)
        return JSONResponse({"id": call.name, "object": "file", "deleted": True})

    # ---- Batches

    async def _create(self, call: Call) -> Response:
        request = BatchRequest.read(await call.body())
        batch = await self._call(self._created, call.owner, request)
        self._service.notice()
        log.info("Batch %s was created for file %s.", batch.id, batch.input_file_id)
        return JSONResponse(batch.public())

    def _created(self, owner: str, request: BatchRequest) -> BatchObject:
        """Return a new batch, which is on the disk. Blocks."""
        file = self._store.file(owner, request.input_file_id)
        if file.purpose != "batch":
            raise InvalidRequestError("'input_file_id' must be a file with the purpose 'batch'.", param="input_file_id")
        self._store.make_room(owner, "batches")
        now, expiry = time.time(), request.output_expires_after
        batch = BatchObject(
            id=f"batch_{new_key(now)}",
            endpoint=request.endpoint,
            input_file_id=file.id,
            created_at=int(now),
            expires_at=int(now) + self._store.keep_seconds,
            metadata=request.metadata,
            output_seconds=expiry.seconds if expiry else None,
        )
        self._store.save(owner, batch)
        return batch

    async def _list_batches(self, call: Call) -> Response:
        query = QueryParams(call.scope["query_string"].decode("latin-1"))
        return JSONResponse(await self._call(self._page, call.owner, "batches", query))

    async def _batch(self, call: Call) -> Response:
        batch = await self._call(self._store.batch, call.owner, call.name)
        return JSONResponse(batch.public())

    async def _cancel(self, call: Call) -> Response:
        batch = await self._call(self._store.batch, call.owner, call.name)
        if batch.ended_at is not None:
            raise BatchBusyError(f"The batch is {batch.status} already, and cannot be cancelled.")
        batch = await self._service.cancel(call.owner, batch)
        return JSONResponse(batch.public())

    def _page(self, owner: str, kind: Kind, query: QueryParams, purpose: str = "") -> Json:
        """Return one answer to a list request. Blocks."""
        limit, order = _limit(query.get("limit"), *PAGES[kind]), query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise InvalidRequestError("'order' must be 'asc' or 'desc'.", param="order")
        items = self._store.objects(owner, kind, query.get("after", ""), is_ascending=order == "asc")
        wanted = (item for item in items if not purpose or getattr(item, "purpose", "") == purpose)
        data = [item.public() for item in islice(wanted, limit + 1)]
        has_more, data = len(data) > limit, data[:limit]
        ids = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        return {"object": "list", "data": data, **ids, "has_more": has_more}


def _content_length(scope: Message) -> int:
    declared = header(scope, b"content-length")
    return int(declared) if declared.isdigit() else 0


def _limit(text: str | None, default: int, most: int) -> int:
    if text is None:
        return default
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= most:
        raise InvalidRequestError(f"'limit' must be a number from 1 to {most}.", param="limit")
    return int(text)


def _lifetime(fields: dict[str, str], most: int) -> int:
    """Return how many seconds an uploaded file is kept, after a check of the form's fields."""
    if fields.get("purpose") != "batch":
        raise InvalidRequestError(
            "'purpose' must be 'batch': this worker keeps files for batches only.", param="purpose"
        )
    expiry = {name: fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds")}
    if not any(expiry.values()):
        return most
    try:
        return min(Expiry.model_validate(expiry).seconds, most)
    except ValidationError:
        raise InvalidRequestError(
            "'expires_after' must have the anchor 'created_at', and from 3600 to 2592000 seconds.",
            param="expires_after",
        ) from None
