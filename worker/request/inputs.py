"""Turns a job's input into one call of the engine's API. Pure: no I/O.

The input has one of five shapes, each recognised by its keys:

- `openai_route`: from RunPod's `/openai` proxy; `openai_input` is the body, by default of a chat.
- `route`: any inference route; with `body` and `method`.
- `messages`: a chat; other OpenAI fields stand beside it or in `sampling_params`.
- `audio`, alone or with `task`: speech to text; other fields of the form stand beside it.
- `prompt`: a completion; or a chat about the images, videos, sounds and documents beside it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from worker.errors import InvalidRequestError, JobError, Json, MethodNotAllowedError, RouteNotFoundError
from worker.media import url
from worker.media.checks import Kind
from worker.request.routes import OWN_ROUTES, ROUTES, Method, method_of

StreamForm = Literal["sse", "text", "objects"]
"""`sse`: SSE text for RunPod's proxy; `text`: the same for readers of `/stream`; `objects`: lists of chunk objects."""

MEDIA: Mapping[str, Kind] = MappingProxyType(
    {"image": "image", "video": "video", "audio": "audio", "document": "document", "pdf": "document"}
)
"""The kind of media in each field beside a prompt. The plural of a field, such as `images`, has a list."""
MEDIA_KEYS: Mapping[str, Kind] = MappingProxyType({**MEDIA, **{f"{field}s": kind for field, kind in MEDIA.items()}})
SPEECH_ROUTES = MappingProxyType({"transcribe": "/v1/audio/transcriptions", "translate": "/v1/audio/translations"})
"""The route for each task of a speech model."""
_ACCEPTED = "It must have one of 'messages', 'prompt', 'audio', 'openai_route', 'route' or 'batch'."
_BOOLEAN = TypeAdapter(bool)
_UPPER_CASE = BeforeValidator(lambda text: text.upper() if isinstance(text, str) else text)


@dataclass(frozen=True, slots=True)
class ApiCall:
    """One call of the engine's HTTP API."""

    method: Method
    path: str
    query: str
    body: Json | None


class JobInput:
    """A job's `input`: the shape that it has, the form in which its stream is sent, and the call that it asks for."""

    def __init__(self, value: object, error: JobError | None = None) -> None:
        """Take the input, and the error with which `call` fails, if the input is known to be wrong."""
        self._value = value
        self._error = error
        keys = value.keys() if isinstance(value, dict) else set[str]()
        self._shape = next((shape for required, shape in _SHAPES if required <= keys), None)

    @property
    def stream_form(self) -> StreamForm | None:
        """How to send the stream; None: the caller asks for no stream."""
        shape = self._shape or _FieldsJob
        return shape.stream_form(self._value) if isinstance(self._value, dict) else None

    def call(self, control_routes: bool = False) -> ApiCall:
        """Return the API call; `control_routes` allows routes that control the engine.

        Raises:
            InvalidRequestError: the input has no accepted shape; the message names the field and what is accepted.
            RouteNotFoundError: the route is not offered.
            MethodNotAllowedError: the route has another method.
        """
        if self._error is not None:
            raise self._error
        if self._shape is None:
            raise InvalidRequestError(f"{_described(self._value)} {_ACCEPTED}")
        try:
            call = self._shape.model_validate(self._value).call()
        except ValidationError as error:
            raise _explained(error, self._shape) from None
        expected = _method_of(call.path)
        if expected is None and not control_routes:
            raise RouteNotFoundError(call.path, ROUTES)
        if expected not in (None, call.method):
            raise MethodNotAllowedError(call.method, expected, call.path)
        return call


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    @classmethod
    def stream_form(cls, value: Any) -> StreamForm | None:
        """Return the form of the stream, also for an input that is invalid otherwise."""
        raise NotImplementedError

    def call(self) -> ApiCall:
        raise NotImplementedError


class _OpenAIJob(_Shape):
    openai_route: str = "/v1/chat/completions"
    openai_input: Json | None = None

    @classmethod
    def stream_form(cls, value: Any) -> StreamForm | None:
        return "sse" if _streams(value.get("openai_input")) else None

    def call(self) -> ApiCall:
        return _route_call(self.openai_route, self.openai_input or None)


class _RouteJob(_Shape):
    route: str
    body: Json | None = None
    method: Annotated[Method | None, _UPPER_CASE] = None

    @classmethod
    def stream_form(cls, value: Any) -> StreamForm | None:
        return "objects" if _streams(value.get("body")) else None

    def call(self) -> ApiCall:
        return _route_call(self.route, self.body, self.method)


class _FieldsJob(_Shape):
    """A shape that accepts every other OpenAI field. Fields beside `sampling_params` win over those in it."""

    model_config = ConfigDict(strict=True, extra="allow")
    sampling_params: Json | None = None

    @classmethod
    def stream_form(cls, value: Any) -> StreamForm | None:
        return "objects" if _streams(value) or _streams(value.get("sampling_params")) else None

    def post(self, path: str, body: Json) -> ApiCall:
        return ApiCall("POST", path, "", {**(self.sampling_params or {}), **(self.model_extra or {}), **body})


class _ChatJob(_FieldsJob):
    messages: list[Json]

    def call(self) -> ApiCall:
        if misplaced := sorted(MEDIA_KEYS.keys() & (self.model_extra or {}).keys()):
            part = json.dumps(_part(MEDIA_KEYS[misplaced[0]], "…"), ensure_ascii=False)
            raise InvalidRequestError(
                f"{misplaced[0]!r} belongs to 'prompt'. With 'messages', put it into a message's content: {part}.",
                param=misplaced[0],
            )
        return self.post("/v1/chat/completions", {"messages": self.messages})


class _SpeechJob(_FieldsJob):
    audio: str
    task: Literal["transcribe", "translate"] = "transcribe"

    def call(self) -> ApiCall:
        if misplaced := sorted(MEDIA_KEYS.keys() & (self.model_extra or {}).keys()):
            raise InvalidRequestError(
                f"{misplaced[0]!r} must not stand beside 'audio' and 'task': one sound is written down at a time. "
                "To ask a chat model about several media, leave out 'task' and send a 'prompt'.",
                param=misplaced[0],
            )
        return self.post(SPEECH_ROUTES[self.task], {"file": _link("audio", self.audio, "audio")})


class _PromptJob(_FieldsJob):
    prompt: str | list[Any]
    apply_chat_template: bool = False
    image: str | None = None
    images: list[str] | None = None
    video: str | None = None
    videos: list[str] | None = None
    audio: str | None = None
    audios: list[str] | None = None
    document: str | None = None
    documents: list[str] | None = None
    pdf: str | None = None
    pdfs: list[str] | None = None

    def call(self) -> ApiCall:
        parts = [_part(kind, _link(field, text, kind)) for field, kind, text in self._media()]
        if not parts and not self.apply_chat_template:
            return self.post("/v1/completions", {"prompt": self.prompt})
        if not isinstance(self.prompt, str):
            raise InvalidRequestError("'prompt' must be a string when it becomes a chat message.", param="prompt")
        content = [*parts, {"type": "text", "text": self.prompt}] if parts else self.prompt
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]})

    def _media(self) -> Iterator[tuple[str, Kind, str]]:
        """Yield the field, the kind and the text of each image, video, sound and document."""
        for field, kind in MEDIA.items():
            if (text := getattr(self, field)) is not None:
                yield field, kind, text
            for index, text in enumerate(getattr(self, f"{field}s") or ()):
                yield f"{field}s[{index}]", kind, text


_SHAPES: tuple[tuple[frozenset[str], type[_Shape]], ...] = (
    (frozenset({"openai_route"}), _OpenAIJob),
    (frozenset({"openai_input"}), _OpenAIJob),
    (frozenset({"route"}), _RouteJob),
    (frozenset({"messages"}), _ChatJob),
    (frozenset({"audio", "task"}), _SpeechJob),
    (frozenset({"prompt"}), _PromptJob),
    (frozenset({"audio"}), _SpeechJob),
)
"""The shapes and the keys that identify them, in the order in which they are tried."""


def _streams(body: object) -> bool:
    """Read `stream` as the engine's pydantic model does, which accepts "true" and 1."""
    try:
        return isinstance(body, dict) and _BOOLEAN.validate_python(body.get("stream") or False)
    except ValidationError:
        return False


def _described(value: object) -> str:
    """Say what an input without an accepted shape is."""
    if isinstance(value, dict):
        keys = ", ".join(repr(key) for key in sorted(map(str, value))) or "no keys"
        return f"The job's input has {keys}, which is not an accepted shape."
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return f"The job's input must be a JSON object, not {names.get(type(value), type(value).__name__)}."


def _explained(error: ValidationError, shape: type[_Shape]) -> InvalidRequestError:
    """Name the first wrong field. Its value is left out: it may be a prompt."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field, *rest = first["loc"] or ("input",)
    path = f"{field}{''.join(f'[{part}]' for part in rest if isinstance(part, int))}"
    accepted = ", ".join(f"'{name}'" for name in shape.model_fields)
    what = f"{first['msg']}." if first["type"] != "extra_forbidden" else f"unknown field; accepted are {accepted}."
    return InvalidRequestError(f"Wrong field {path!r} in the job's input: {what}", param=path)


def _method_of(path: str) -> Method | None:
    """Return the method of an inference route or of one of the worker's own; None for others."""
    return "GET" if path in OWN_ROUTES else method_of(path)


def _route_call(route: str, body: Json | None, method: Method | None = None) -> ApiCall:
    path, _, query = f"/{route.lstrip('/')}".partition("?")
    method = method or _method_of(path) or ("GET" if body is None else "POST")
    # With an empty body, the engine's error names the missing field. Without a body it is about the content type.
    return ApiCall(method, path, query, body if body is not None or method == "GET" else {})


def _link(field: str, text: str, kind: Kind) -> str:
    """Return a URL for a field's text: a URL or base64."""
    try:
        return url.from_text(text, kind)
    except ValueError as error:
        raise InvalidRequestError(f"{field!r} {error}", param=field) from None


def _part(kind: Kind, link: str) -> Json:
    """Return the part of a message's content for a link."""
    if kind == "document":
        return {"type": "file", "file": {"file_data" if link[:5].lower() == "data:" else "file_url": link}}
    return {"type": f"{kind}_url", f"{kind}_url": {"url": link}}
