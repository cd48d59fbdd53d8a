"""Turns a job's input into one call of the engine's API. Pure: no I/O.

The input has one of four shapes, each recognised by a key:

- `openai_route`: from RunPod's `/openai` proxy; `openai_input` is the body, by default of a chat.
- `route`: any inference route; with `body` and `method`.
- `messages`: a chat; other OpenAI fields stand beside it or in `sampling_params`.
- `prompt`: a completion; or a chat about the `image`, `images`, `video` or `videos` beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from worker.errors import InvalidRequestError, Json, MethodNotAllowedError, RouteNotFoundError
from worker.media import url
from worker.request.routes import OWN_ROUTES, ROUTES, Method, method_of

StreamForm = Literal["sse", "text", "objects"]
"""`sse`: SSE text for RunPod's proxy; `text`: the same for readers of `/stream`; `objects`: lists of chunk objects."""

MEDIA_KEYS = {"image", "images", "video", "videos"}
_ACCEPTED = "It must have one of 'messages', 'prompt', 'openai_route' or 'route'."
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

    def __init__(self, value: object) -> None:
        self._value = value
        self._shape = next((shape for key, shape in _SHAPES.items() if isinstance(value, dict) and key in value), None)

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
        if misplaced := sorted(MEDIA_KEYS & (self.model_extra or {}).keys()):
            raise InvalidRequestError(
                f"{misplaced[0]!r} belongs to 'prompt'. With 'messages', put it into a message's content: "
                '{"type": "image_url", "image_url": {"url": …}}, or "video_url".',
                param=misplaced[0],
            )
        return self.post("/v1/chat/completions", {"messages": self.messages})


class _PromptJob(_FieldsJob):
    prompt: str | list[Any]
    apply_chat_template: bool = False
    image: str | None = None
    images: list[str] | None = None
    video: str | None = None
    videos: list[str] | None = None

    def call(self) -> ApiCall:
        parts = [*_parts("image", self.image, self.images), *_parts("video", self.video, self.videos)]
        if not parts and not self.apply_chat_template:
            return self.post("/v1/completions", {"prompt": self.prompt})
        if not isinstance(self.prompt, str):
            raise InvalidRequestError("'prompt' must be a string when it becomes a chat message.", param="prompt")
        content = [*parts, {"type": "text", "text": self.prompt}] if parts else self.prompt
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]})


_SHAPES: Mapping[str, type[_Shape]] = MappingProxyType(
    {
        "openai_route": _OpenAIJob,
        "openai_input": _OpenAIJob,
        "route": _RouteJob,
        "messages": _ChatJob,
        "prompt": _PromptJob,
    }
)
"""The shapes by the key that identifies them, in the order in which they are tried."""


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


def _parts(kind: str, single: str | None, several: list[str] | None) -> list[Json]:
    """Return the content parts of the shorthand fields `image` and `images`, or `video` and `videos`."""
    fields = [(f"{kind}s[{index}]", value) for index, value in enumerate(several or [])]
    return [_part(kind, value, field) for field, value in ([(kind, single)] if single is not None else []) + fields]


def _part(kind: str, value: str, field: str) -> Json:
    try:
        link = url.from_text(value, kind)
    except ValueError as error:
        raise InvalidRequestError(f"{field!r} {error}", param=field) from None
    return {"type": f"{kind}_url", f"{kind}_url": {"url": link}}
