"""Validation of request bodies whose cost is bounded, also for a body with many mistakes.

FastAPI and pydantic report every mistake, and for an item of a union one mistake for each of its types: 20,000 numbers
as the input of /v1/responses, 40 kB, take half a minute and 6 GB. Here, validation ends at the first wrong item of
each list and mapping. Large bodies are validated in a thread, so that other requests go on.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic_core import SchemaValidator
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from vllm.exceptions import VLLMValidationError

from worker.engine.media_errors import current_body
from worker.errors import InvalidRequestError

LARGE_BYTES = 30_000
"""Bodies above this size are validated in a thread. Smaller ones take less than 0.1 s."""
MAX_CONVERSATIONS = 512
"""How many conversations a batch may have."""
MAX_INTEGER = 2**63 - 1
MAX_ERRORS = 1_000
"""How many errors are kept; vLLM's message has the first ten. One mistake makes up to a few hundred."""
MAX_KEY_CHARACTERS = 100
"""How much of a key an error repeats. Callers choose the keys."""
MAX_MESSAGE_CHARACTERS = 4_000
"""The length of an error's message. vLLM's message about ten errors is shorter."""

UNPARSED = "There was an error parsing the body"
"""FastAPI's message for a body that Python's parser fails to read for another reason than its syntax."""
_COLLECTIONS = ("list", "tuple", "set", "frozenset", "dict")
_SCALARS = ("any", "bool", "float", "int", "literal", "none", "str")
_LONG_PATH = re.compile(r"((?:/[\w-]++){16})(?:/[\w-]++)+")


def in_threads(validate: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Return FastAPI's `request_body_to_args` as a function that validates large bodies in a thread."""

    async def validate_in_thread(**arguments: Any) -> Any:
        body, received = current_body.get(), arguments["received_body"]
        _check_fields(received)
        if body is None or body.size <= LARGE_BYTES or not isinstance(received, dict | list):
            return await validate(**arguments)
        # For a JSON body, FastAPI's coroutine waits for nothing that belongs to the event loop.
        return await body.in_thread(asyncio.run, validate(**arguments))

    return validate_in_thread


def _check_fields(body: Any) -> None:
    """Raise vLLM's validation error for wrong fields that vLLM's own validation misses or answers with status 500."""
    if not isinstance(body, dict):
        return
    for name, value in body.items():
        if isinstance(value, int) and not -MAX_INTEGER <= value <= MAX_INTEGER:
            raise VLLMValidationError(f"{name[:MAX_KEY_CHARACTERS]!r} is a number of more than 64 bits.")
    if not isinstance(body.get("structured_outputs"), dict | None):
        raise VLLMValidationError('\'structured_outputs\' must be an object, such as {"regex": "[a-z]+"}.')
    messages = body.get("messages")
    if isinstance(messages, list) and len(messages) > MAX_CONVERSATIONS and isinstance(messages[0], list):
        # vLLM renders all of them at once.
        raise VLLMValidationError(
            f"'messages' has {len(messages)} conversations; at most {MAX_CONVERSATIONS} are accepted. "
            "Send several requests."
        )


def bounded(sub: Callable[[str, str, str], str]) -> Callable[[str, str, str], str]:
    """Return `re.sub` for error messages of any length, which may repeat what a caller has sent.

    One of vLLM's patterns takes 12 s for the 10 kB of `/a/a/a/…`, a name of a model for example.
    """

    def bounded_sub(pattern: str, replacement: str, message: str) -> str:
        return sub(pattern, replacement, _LONG_PATH.sub(r"\1…", message[:MAX_MESSAGE_CHARACTERS]))

    return bounded_sub


def fail_fast(app: Starlette) -> None:
    """Have the routes of vLLM's app stop at the first wrong item of a list, and repeat little of it in the error."""
    for route in app.routes:
        if isinstance(route, APIRoute):
            for field in route.dependant.body_params:
                adapter = field._type_adapter
                # Without this argument, pydantic would use the validators that the classes of the models have already.
                adapter.validator = SchemaValidator(_failing_fast(adapter.core_schema), _use_prebuilt=False)
    handlers: Any = app.exception_handlers
    app.add_exception_handler(RequestValidationError, _shortening(handlers[RequestValidationError]))
    app.add_exception_handler(HTTPException, _parse_error(handlers[HTTPException]))
    # Starlette builds the stack again at the next request, with the new handler.
    app.middleware_stack = None


def _failing_fast(schema: Any) -> Any:
    """Return a copy of a part of a pydantic schema whose collections fail at their first wrong item."""
    if isinstance(schema, list | tuple):
        return type(schema)(map(_failing_fast, schema))
    if not isinstance(schema, dict):
        return schema
    copy = {key: _failing_fast(value) for key, value in schema.items()}
    if schema.get("type") in _COLLECTIONS:
        copy["fail_fast"] = True
    if schema.get("type") == "list" and "items_schema" in schema and schema["items_schema"]["type"] not in _SCALARS:
        function = {"type": "no-info", "function": _let_threads_run}
        copy["items_schema"] = {"type": "function-before", "function": function, "schema": copy["items_schema"]}
    return copy


def _let_threads_run(value: Any) -> Any:
    """Return `value`. Python switches between threads only in Python code, and pydantic's own code is none."""
    return value


def _shortening(
    handler: Callable[[Request, RequestValidationError], Awaitable[Response]],
) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def handle(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        errors = [_shortened(item) for item in error.errors()[:MAX_ERRORS]]
        return await handler(request, RequestValidationError(errors))

    return handle


def _parse_error(
    handler: Callable[[Request, Any], Awaitable[Response]],
) -> Callable[[Request, Any], Awaitable[Response]]:
    """Return a handler that answers with OpenAI's error body where FastAPI has a text of its own."""

    async def handle(request: Request, error: Any) -> Response:
        if error.detail != UNPARSED:
            return await handler(request, error)
        message = "The request body cannot be parsed as JSON, for example because a number has too many digits."
        return JSONResponse(InvalidRequestError(message).body(), InvalidRequestError.status)

    return handle


def _shortened(error: Any) -> Any:
    """Return an error whose path has only the beginning of long keys. vLLM shortens the rest of an error itself."""
    if not isinstance(error, dict) or "loc" not in error:
        return error
    return {**error, "loc": tuple(key[:MAX_KEY_CHARACTERS] if isinstance(key, str) else key for key in error["loc"])}
