"""Multipart forms in pieces, and the limits of bodies."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from worker.errors import BodyTooSlowError, UploadTooLargeError
from worker.http.forms import Form, pieces
from worker.request.asgi import ClientDisconnectedError, Message, Receive

TYPE = "multipart/form-data; boundary=edge"
CONTENT = b"one\r\n--edg\r\ntwo\r\n--\r\n"
BODY = (
    b'--edge\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--edge\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n'
    b"Content-Type: application/octet-stream\r\n\r\n" + CONTENT + b"\r\n--edge--\r\n"
)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_a_form_is_the_same_in_pieces_of_any_size(size: int) -> None:
    form = Form(TYPE)
    content = b"".join(form.feed(BODY[start : start + size]) for start in range(0, len(BODY), size))
    form.check_complete()
    assert (content, form.fields, form.filename) == (CONTENT, {"purpose": "batch"}, "a.jsonl")


def body(*parts: bytes, pause: float = 0.0) -> Receive:
    """Return a `receive` that pauses before each part. After the last one, which is not marked, the client leaves."""
    left = list(parts)

    async def receive() -> Message:
        await asyncio.sleep(pause)
        if not left:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": left.pop(0), "more_body": True}

    return receive


async def read(parts: AsyncIterator[bytes]) -> bytes:
    return b"".join([piece async for piece in parts])


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        pytest.param(lambda: pieces(body(b"123", b"456"), 5), UploadTooLargeError, id="too large"),
        pytest.param(lambda: pieces(body(b"123"), 5), ClientDisconnectedError, id="a client that leaves"),
        pytest.param(lambda: pieces(body(b"1", pause=5), 5, "", 0.05), BodyTooSlowError, id="a pause"),
        pytest.param(lambda: pieces(body(*[b"1"] * 99, pause=0.02), 99, "", 0.1), BodyTooSlowError, id="drops"),
    ],
)
def test_a_body_has_limits(parts: Callable[[], AsyncIterator[bytes]], error: type[Exception]) -> None:
    with pytest.raises(error):
        asyncio.run(read(parts()))


def test_bytes_give_an_upload_more_time() -> None:
    received = body(*[bytes(10_000)] * 5, pause=0.05)
    with pytest.raises(ClientDisconnectedError):
        asyncio.run(read(pieces(received, 10**6, "", 0.2)))
