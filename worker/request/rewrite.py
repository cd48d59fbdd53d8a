"""Layers that change a request before the engine's app parses it. Each is an ASGI app around another one."""

from collections.abc import Awaitable, Callable

from worker.request.asgi import App, Message, Receive, Send, header, with_headers

Rewrite = Callable[[Message, bytes], Awaitable[tuple[Message, bytes]]]
"""Takes a request's scope and its whole body, and returns those that the app gets. Raises `JobError`."""


def rewriting(app: App, rewrite: Rewrite) -> App:
    """Return `app` with the body of every POST request rewritten. The body must arrive in one message."""

    async def rewritten(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await app(scope, receive, send)
        message = await receive()
        if message["type"] != "http.request":
            return await app(scope, _then(message, receive), send)
        scope, body = await rewrite(scope, message.get("body", b""))
        return await app(scope, _then({**message, "body": body}, receive), send)

    return rewritten


def is_json(scope: Message) -> bool:
    """Return whether the request's content type is JSON, or missing."""
    content_type = header(scope, b"content-type").partition(b";")[0].strip().lower()
    return content_type in (b"", b"application/json") or content_type.endswith(b"+json")


def with_body(scope: Message, body: bytes, content_type: str) -> tuple[Message, bytes]:
    """Return the scope with the headers that describe `body`, and `body`."""
    return with_headers(scope, {"content-type": content_type, "content-length": str(len(body))}), body


def _then(message: Message, receive: Receive) -> Receive:
    """Return a `receive` that gives `message` first."""
    pending = [message]

    async def receive_next() -> Message:
        return pending.pop() if pending else await receive()

    return receive_next
