"""Layers that change a request before the engine's app parses it. Each is an ASGI app around another one."""

import asyncio
from collections.abc import Awaitable, Callable

from worker import race
from worker.request.asgi import App, ClientDisconnectedError, Message, Receive, Send, header, with_headers
from worker.threads import Result

Rewrite = Callable[[Message, bytes], Awaitable[tuple[Message, bytes]]]
"""Takes a request's scope and its whole body, and returns those that the app gets. Raises `JobError`."""


def rewriting(app: App, rewrite: Rewrite) -> App:
    """Return `app` with the body of every POST request rewritten. The body must arrive in one message."""

    async def rewritten(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await app(scope, receive, send)
        message = await receive()
        if message["type"] != "http.request":
            return await app(scope, then(message, receive), send)
        try:
            scope, body = await unless_disconnected(rewrite(scope, message.get("body", b"")), receive)
        except ClientDisconnectedError:
            return None
        return await app(scope, then({**message, "body": body}, receive), send)

    return rewritten


async def unless_disconnected(work: Awaitable[Result], receive: Receive) -> Result:
    """Wait for `work` in the current task, and return its result. When the client disconnects, `work` is cancelled.

    The body must have been received: `receive` waits for the disconnect only.

    Raises:
        ClientDisconnectedError: the client has disconnected.
    """
    has_left = False
    watching: list[asyncio.Task[None]] = []

    async def watch() -> None:
        nonlocal has_left
        has_left = (await receive())["type"] == "http.disconnect"
        if has_left:
            # Now: the end of the block below is due.
            until.reschedule(0)

    # Work that never waits ends before the task would start.
    start = asyncio.get_running_loop().call_soon(lambda: watching.append(asyncio.create_task(watch())))
    try:
        async with asyncio.timeout(None) as until:
            result = await work
    except TimeoutError:
        if not until.expired():
            raise
    finally:
        start.cancel()
        await race.end(*watching)
    if has_left:
        raise ClientDisconnectedError
    return result


def then(message: Message, receive: Receive) -> Receive:
    """Return a `receive` that gives `message` first."""
    pending = [message]

    async def receive_next() -> Message:
        return pending.pop() if pending else await receive()

    return receive_next


def is_json(scope: Message) -> bool:
    """Return whether the request's content type is JSON, or missing."""
    content_type = header(scope, b"content-type").partition(b";")[0].strip().lower()
    return content_type in (b"", b"application/json") or content_type.endswith(b"+json")


def with_body(scope: Message, body: bytes, content_type: str) -> tuple[Message, bytes]:
    """Return the scope with the headers that describe `body`, and `body`."""
    return with_headers(scope, {"content-type": content_type, "content-length": str(len(body))}), body
