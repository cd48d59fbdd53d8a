"""Speech to text. vLLM's routes take a form with an uploaded file; the worker also takes JSON with a link or base64."""

import json
from collections.abc import Awaitable, Callable, Iterator
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from starlette.datastructures import FormData, State, UploadFile
from urllib3 import encode_multipart_formdata

from worker.engine.connector import Guard, as_media_errors
from worker.engine.media_errors import NOUNS, RejectedMediaError, current_body
from worker.errors import InvalidRequestError, Json, MediaError
from worker.media import url
from worker.media.checks import Limit, check_size
from worker.media.decoders import SoundForm
from worker.request.asgi import Message, header
from worker.request.inputs import SPEECH_ROUTES
from worker.request.rewrite import Rewrite, is_json, with_body
from worker.telemetry.usage import rejected

Samples = npt.NDArray[np.float32]

FILE = "file"
HANDLERS = frozenset({"openai_serving_transcription", "openai_serving_translation"})
"""The names of vLLM's handlers in the state of its app."""
LISTS = ("timestamp_granularities",)
"""Fields whose name has `[]` at its end in a form."""
NO_FILE = (
    "'file' is missing, or is not a sound. In a form, upload a file in the field 'file'. In JSON, 'file' is a URL "
    "(https:, http:, data:) or base64."
)


def rewriting_json(guard: Guard) -> Rewrite:
    """Return the layer that turns JSON bodies into forms. Files are loaded through `guard`."""

    async def rewrite(scope: Message, body: bytes) -> tuple[Message, bytes]:
        if scope["path"] not in SPEECH_ROUTES.values():
            return scope, body
        if not is_json(scope):
            _check_boundary(header(scope, b"content-type").lower())
            return scope, body
        link, fields = await _in_thread(_parsed, body)
        try:
            with guard.account() as account, as_media_errors():
                data = await guard.file(link, "audio", account)
                # The form is a copy.
                await account.take_media(len(data))
        except MediaError as error:
            raise _about_file(error) from None
        form, content_type = await _in_thread(encode_multipart_formdata, [*fields, (FILE, (FILE, data))])
        return with_body(scope, form, content_type)

    return rewrite


def replace_decoding(state: State, guard: Guard) -> None:
    """Have vLLM's handlers decode uploads through `guard`, in the request's own task."""
    for name in HANDLERS:
        if (handler := getattr(state, name, None)) is not None:
            handler._decode_and_chunk_speech_async = _decoding(handler, guard)


def _decoding(handler: Any, guard: Guard) -> Callable[[bytes], Awaitable[tuple[list[Samples], float]]]:
    """Return a function that decodes an uploaded file, and has vLLM cut its samples into chunks."""
    rate, seconds = int(handler.asr_config.sample_rate), handler.max_audio_decode_duration_s
    form = SoundForm(rate, seconds, handler.max_audio_decode_bytes)
    cut = handler._decode_and_chunk_speech_async

    async def decode_and_cut(data: bytes) -> tuple[list[Samples], float]:
        try:
            with guard.account() as account, as_media_errors():
                samples, _ = await guard.decoders.sound(data, form, account)
        except MediaError as error:
            raise RejectedMediaError(_about_file(error)) from None
        result: tuple[list[Samples], float] = await cut(samples)
        return result

    return decode_and_cut


def samples_of(file: BytesIO, *, sr: float, **_: Any) -> tuple[Samples, float]:
    """Return the samples that are in a file, in place of vLLM's function, which decodes a sound."""
    return np.frombuffer(file.getvalue(), np.float32), sr


def checking_upload(validate: Callable[..., Awaitable[Any]], limit: Limit) -> Callable[..., Awaitable[Any]]:
    """Return FastAPI's `request_body_to_args` as a function that first checks the file of a form, and its size."""

    async def checked(**arguments: Any) -> Any:
        form = arguments["received_body"]
        if isinstance(form, FormData):
            if not isinstance(file := form.get(FILE), UploadFile):
                raise RejectedMediaError(MediaError(NO_FILE, param=FILE))
            try:
                check_size(file.size or 0, limit)
            except MediaError as error:
                raise RejectedMediaError(_about_file(error)) from None
        return await validate(**arguments)

    return checked


async def _in_thread(work: Callable[..., Any], *arguments: object) -> Any:
    """Call `work` in a thread for large bodies, so that other requests get a turn meanwhile."""
    body = current_body.get()
    return await body.in_thread(work, *arguments) if body else work(*arguments)


def _parsed(body: bytes) -> tuple[str, list[tuple[str, str]]]:
    """Return the URL of the file in a JSON body, and the other fields as those of a form."""
    try:
        fields = json.loads(body)
    except ValueError:
        raise InvalidRequestError("The request body is neither a form nor valid JSON.") from None
    if not isinstance(fields, dict) or not isinstance(text := fields.pop(FILE, None), str):
        raise InvalidRequestError(NO_FILE, param=FILE)
    try:
        return url.from_text(text, "audio"), list(_form(fields))
    except ValueError as error:
        raise InvalidRequestError(f"{FILE!r} {error}", param=FILE) from None


def _form(fields: Json) -> Iterator[tuple[str, str]]:
    """Yield the fields of a JSON body as those of a form; a list is a repeated field."""
    for name, value in fields.items():
        for item in value if isinstance(value, list) else [value]:
            text = item if isinstance(item, str) else json.dumps(item)
            if not _is_unicode(name + text):
                raise InvalidRequestError("The request body has half of a surrogate pair, which is no character.")
            if isinstance(item, dict | list):
                raise InvalidRequestError(
                    f"{name[:100]!r} must be a string, a number, a boolean or a list of these: vLLM takes a form.",
                    param=name[:100],
                )
            if item is not None:
                yield f"{name}[]" if name in LISTS else name, text


def _is_unicode(text: str) -> bool:
    """Return whether UTF-8 can encode a text. JSON may name half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_boundary(content_type: bytes) -> None:
    if content_type.startswith(b"multipart/form-data") and b"boundary=" not in content_type:
        raise InvalidRequestError(
            "The Content-Type header of the form has no boundary. Let your HTTP client set this header, or send JSON."
        )


def _about_file(error: MediaError) -> MediaError:
    """Complete an error about the file, and add it to the usage of the job."""
    return rejected(type(error)(f"{FILE}, {NOUNS['audio']}: {error}.", param=FILE))
