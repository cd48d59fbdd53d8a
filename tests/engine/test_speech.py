"""Speech to text without an engine: JSON bodies become forms, and uploads are decoded in child processes."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from starlette.datastructures import State
from starlette.requests import Request as StarletteRequest

from tests.support import hostile
from tests.support import speech as sounds
from tests.support.links import Server
from worker import settings
from worker.engine import speech
from worker.engine.connector import Guard
from worker.engine.media_errors import RejectedMediaError
from worker.errors import InvalidRequestError, JobError, MediaTooLargeError, RefusedLinkError
from worker.memory import Budget, current_account
from worker.request.asgi import Message, Request
from worker.telemetry.usage import Usage, current_usage

ROUTE = "/v1/audio/transcriptions"
SOUND = sounds.wav("1")
BASE64 = base64.b64encode(SOUND).decode()


@asynccontextmanager
async def guarded(**environ: str) -> AsyncIterator[Guard]:
    guard = Guard(settings.read(environ), Budget(2 << 30), modules=["av"])
    async with aclosing(guard):
        yield guard


async def rewritten(
    body: Any, path: str = ROUTE, content_type: str = "application/json", **environ: str
) -> tuple[Message, bytes]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with guarded(**environ) as guard:
        request = Request("POST", path, headers={"content-type": content_type, "content-length": str(len(data))})
        return await speech.rewriting_json(guard)(request.scope(), data)


async def form_of(scope: Message, body: bytes) -> list[tuple[str, Any]]:
    """Return the fields of a form, read as vLLM reads them."""

    async def receive() -> Message:
        return {"type": "http.request", "body": body}

    async with StarletteRequest(scope, receive).form() as form:
        return [(name, await item.read() if name == "file" else item) for name, item in form.multi_items()]  # type: ignore[union-attr]


def fields(body: Any, **environ: str) -> list[tuple[str, Any]]:
    async def work() -> list[tuple[str, Any]]:
        scope, form = await rewritten(body, **environ)
        assert (b"content-length", str(len(form)).encode()) in scope["headers"]
        return await form_of(scope, form)

    return asyncio.run(work())


def test_a_json_body_becomes_a_form() -> None:
    body = {
        "file": BASE64,
        "model": "tiny",
        "language": None,
        "prompt": 'é "\r\n--x',
        "stream": True,
        "temperature": 0.5,
        "seed": 7,
        "timestamp_granularities": ["word", "segment"],
    }
    assert fields(body) == [
        ("model", "tiny"),
        ("prompt", 'é "\r\n--x'),
        ("stream", "true"),
        ("temperature", "0.5"),
        ("seed", "7"),
        ("timestamp_granularities[]", "word"),
        ("timestamp_granularities[]", "segment"),
        ("file", SOUND),
    ]


def test_a_list_may_have_its_name_in_a_form() -> None:
    assert fields({"file": BASE64, "timestamp_granularities[]": ["word"]})[0] == ("timestamp_granularities[]", "word")


def test_a_link_is_fetched() -> None:
    with Server() as server:
        body = {"file": f"{server.url}/speech/1-de"}
        assert fields(body, MEDIA_ALLOW_PRIVATE_NETWORKS="true") == [("file", SOUND)]


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        pytest.param("/v1/chat/completions", "application/json", id="another route"),
        pytest.param(ROUTE, "multipart/form-data; boundary=x", id="a form"),
        pytest.param(ROUTE, "application/x-www-form-urlencoded", id="a form without files"),
    ],
)
def test_other_requests_stay_as_they_are(path: str, content_type: str) -> None:
    scope, body = asyncio.run(rewritten(b"anything", path, content_type))
    assert (dict(scope["headers"])[b"content-type"], body) == (content_type.encode(), b"anything")


@pytest.mark.parametrize(
    ("body", "error_type", "param", "message"),
    [
        pytest.param(b"", InvalidRequestError, None, "neither a form nor valid JSON", id="nothing"),
        pytest.param([], InvalidRequestError, "file", "'file' is missing, or is not a sound", id="a list"),
        pytest.param({"file": None}, InvalidRequestError, "file", "'file' is missing, or is not a sound", id="null"),
        pytest.param({"file": "a b"}, InvalidRequestError, "file", "'file' is neither a URL", id="text"),
        pytest.param(
            {"file": base64.b64encode(b"%PDF-1.7" + bytes(60)).decode()},
            InvalidRequestError,
            "file",
            "'file' contains application/pdf where audio data is expected",
            id="a document",
        ),
        pytest.param(
            {"file": "http://127.0.0.1/a.wav"}, RefusedLinkError, "file", "file, a sound: ", id="a private link"
        ),
        pytest.param({"file": "file:///etc/passwd"}, RefusedLinkError, "file", "file, a sound: ", id="a file: link"),
        pytest.param(
            {"file": BASE64, "prompt": {"a": 1}},
            InvalidRequestError,
            "prompt",
            "'prompt' must be a string",
            id="object",
        ),
        pytest.param(
            {"file": BASE64, "prompt": "\ud800"}, InvalidRequestError, None, "half of a surrogate pair", id="no Unicode"
        ),
    ],
)
def test_errors_name_the_field(body: Any, error_type: type[JobError], param: str | None, message: str) -> None:
    with pytest.raises(error_type) as caught:
        asyncio.run(rewritten(body))
    assert caught.value.param == param
    assert message in str(caught.value)


def test_a_form_without_a_boundary_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="has no boundary"):
        asyncio.run(rewritten(b"--x", content_type="multipart/form-data"))


def test_a_file_that_is_too_large_is_refused_and_counted() -> None:
    async def work() -> Usage:
        current_usage.set(usage := Usage())
        with pytest.raises(MediaTooLargeError, match=r"^file, a sound: it has more bytes than MAX_AUDIO_BYTES=1000 "):
            await rewritten({"file": BASE64}, MAX_AUDIO_BYTES="1000")
        return usage

    assert asyncio.run(work()).rejections == ["too_large"]


# ---- Decoding


def in_handler(work: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
    """Call `work` with a handler like vLLM's, which cuts samples by returning them."""

    async def run() -> Any:
        async with guarded() as guard:

            async def cut(samples: Any) -> Any:
                return [samples], len(samples) / 8_000

            handler = SimpleNamespace(
                asr_config=SimpleNamespace(sample_rate=8_000.0),
                max_audio_decode_duration_s=600,
                max_audio_decode_bytes=256 << 20,
                _decode_and_chunk_speech_async=cut,
            )
            speech.replace_decoding(State({"openai_serving_transcription": handler}), guard)
            account = Budget(1 << 30).account()
            current_account.set(account)
            return await work(handler)

    return asyncio.run(run())


def test_an_upload_is_decoded_for_its_request() -> None:
    async def work(handler: Any) -> Any:
        account = current_account.get()
        assert account is not None
        decoded = await handler._decode_and_chunk_speech_async(SOUND)
        assert account.media >= 4 * 5_600
        return decoded

    (samples,), seconds = in_handler(work)
    assert (len(samples), str(samples.dtype), seconds) == (5_600, "float32", 0.7)


@pytest.mark.parametrize("data", [hostile.SESSION, b"", b"text"], ids=["a session description", "nothing", "text"])
def test_a_hostile_upload_is_refused_by_its_kind(data: bytes) -> None:
    with pytest.raises(RejectedMediaError, match=r"^file, a sound: it") as caught:
        in_handler(lambda handler: handler._decode_and_chunk_speech_async(data))
    assert (caught.value.error.status, caught.value.error.param) == (400, "file")


def test_a_cancelled_request_ends_its_decoding() -> None:
    async def work(handler: Any) -> None:
        await handler._decode_and_chunk_speech_async(SOUND)
        (process,) = psutil.Process().children()
        process.suspend()
        decoding = asyncio.create_task(handler._decode_and_chunk_speech_async(SOUND))
        await asyncio.sleep(0.1)
        decoding.cancel()
        await asyncio.gather(decoding, return_exceptions=True)
        await asyncio.to_thread(process.wait, 10)
        assert await handler._decode_and_chunk_speech_async(SOUND)

    in_handler(work)
