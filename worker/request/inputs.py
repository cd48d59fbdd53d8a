"""A job's input, in any of the accepted shapes, becomes one call of the engine's API. Pure: no I/O.

Shapes, told apart by the key that each must have:

- `openai_route`: RunPod's `/openai` proxy; with `openai_input`, the body.
- `route`: any inference route by name; with `body` and `method`.
- `messages`: a chat, its other OpenAI fields beside it or in `sampling_params`.
- `prompt`: a completion, or a chat about the `image`, `images`, `video`, `videos` beside it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from worker.errors import InvalidRequestError, Json, RouteNotFoundError
from worker.media import url
from worker.request.routes import OWN_ROUTES, Method, method_of

StreamForm = Literal["sse", "objects"]


@dataclass(frozen=True, slots=True)
class ApiCall:
    """One call of the engine's HTTP API."""

    method: Method
    path: str
    query: str
    body: Json | None


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    key: ClassVar[str]

    def call(self) -> ApiCall:
        raise NotImplementedError


class _OpenAIJob(_Shape):
    key = "openai_route"
    openai_route: str
    openai_input: Json | None = None

    def call(self) -> ApiCall:
        return _route_call(self.openai_route, self.openai_input or None)


class _RouteJob(_Shape):
    key = "route"
    route: str
    body: Json | None = None
    method: Method | None = None

    def call(self) -> ApiCall:
        return _route_call(self.route, self.body, self.method)


class _FieldsJob(_Shape):
    """A shape that takes every other OpenAI field as it is; those in `sampling_params` yield to those beside it."""

    model_config = ConfigDict(strict=True, extra="allow")
    sampling_params: Json | None = None

    def post(self, path: str, body: Json) -> ApiCall:
        return ApiCall("POST", path, "", {**(self.sampling_params or {}), **(self.model_extra or {}), **body})


class _ChatJob(_FieldsJob):
    key = "messages"
    messages: list[Json]

    def call(self) -> ApiCall:
        if misplaced := sorted(_MEDIA_KEYS & (self.model_extra or {}).keys()):
            raise InvalidRequestError(
                f"{misplaced[0]!r} goes with 'prompt'. With 'messages', put it into a message's content: "
                '{"type": "image_url", "image_url": {"url": …}}, or "video_url".',
                param=misplaced[0],
            )
        return self.post("/v1/chat/completions", {"messages": self.messages})


class _PromptJob(_FieldsJob):
    key = "prompt"
    prompt: str | list[Any]
    apply_chat_template: bool = False
    image: str | None = None
    images: list[str] | None = None
    video: str | None = None
    videos: list[str] | None = None

    def call(self) -> ApiCall:
        media = (("image", self.image, self.images), ("video", self.video, self.videos))
        parts = [_part(kind, value, name) for kind, one, more in media for name, value in _named(kind, one, more)]
        if not parts and not self.apply_chat_template:
            return self.post("/v1/completions", {"prompt": self.prompt})
        if not isinstance(self.prompt, str):
            raise InvalidRequestError("'prompt' must be a string when it becomes a chat message.", param="prompt")
        content = [*parts, {"type": "text", "text": self.prompt}] if parts else self.prompt
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]})


_MEDIA_KEYS = {"image", "images", "video", "videos"}
_SHAPES: tuple[type[_Shape], ...] = (_OpenAIJob, _RouteJob, _ChatJob, _PromptJob)


def parse(job_input: object, control_routes: bool = False) -> ApiCall:
    """Return the call that a job's `input` asks for.

    Raises:
        InvalidRequestError: the input fits no shape; the message names the field and what is accepted.
        RouteNotFoundError: the route is not offered.
    """
    if not isinstance(job_input, dict):
        raise InvalidRequestError(f"The job's input must be a JSON object, not {_json_type(job_input)}. {_ACCEPTED}")
    shape = next((shape for shape in _SHAPES if shape.key in job_input), None)
    if shape is None:
        keys = ", ".join(repr(key) for key in sorted(map(str, job_input))) or "nothing"
        raise InvalidRequestError(f"The job's input has {keys}, which fits no accepted shape. {_ACCEPTED}")
    try:
        call = shape.model_validate(job_input).call()
    except ValidationError as error:
        raise _explained(error, shape) from None
    if not control_routes and method_of(call.path) is None and call.path not in OWN_ROUTES:
        raise RouteNotFoundError(call.path)
    return call


def stream_form(job_input: object) -> StreamForm | None:
    """Tell how the caller wants its stream, also for an input that `parse` refuses; None: it wants no stream."""
    if not isinstance(job_input, dict):
        return None
    if _OpenAIJob.key in job_input:
        return "sse" if _streams(job_input.get("openai_input")) else None
    if _RouteJob.key in job_input:
        return "objects" if _streams(job_input.get("body")) else None
    return "objects" if _streams(job_input) or _streams(job_input.get("sampling_params")) else None


def _streams(body: object) -> bool:
    """Read `stream` as the engine's pydantic does, which takes "true" and 1 for true."""
    try:
        return isinstance(body, dict) and _BOOLEAN.validate_python(body.get("stream") or False)
    except ValidationError:
        return False


_BOOLEAN = TypeAdapter(bool)
_ACCEPTED = "It must have one of 'messages', 'prompt', 'openai_route' or 'route'."


def _explained(error: ValidationError, shape: type[_Shape]) -> InvalidRequestError:
    """Name the first wrong field without repeating its value, which may be a prompt."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field, *rest = first["loc"] or ("input",)
    path = f"{field}{''.join(f'[{part}]' for part in rest if isinstance(part, int))}"
    accepted = ", ".join(f"'{name}'" for name in shape.model_fields)
    what = f"{first['msg']}." if first["type"] != "extra_forbidden" else f"no such field; accepted are {accepted}."
    return InvalidRequestError(f"Wrong field {path!r} in the job's input: {what}", param=path)


def _json_type(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), type(value).__name__)


def _route_call(route: str, body: Json | None, method: Method | None = None) -> ApiCall:
    path, _, query = f"/{route.lstrip('/')}".partition("?")
    method = method or method_of(path) or ("GET" if body is None else "POST")
    # A POST without a body is told which field it lacks, not that its media type is wrong.
    return ApiCall(method, path, query, body if body is not None or method == "GET" else {})


def _named(name: str, one: str | None, several: list[str] | None) -> list[tuple[str, str]]:
    numbered = [(f"{name}s[{index}]", value) for index, value in enumerate(several or [])]
    return [(name, one), *numbered] if one is not None else numbered


def _part(kind: str, value: str, name: str) -> Json:
    try:
        link = url.from_text(value, kind)
    except ValueError as error:
        raise InvalidRequestError(f"{name!r} {error}", param=name) from None
    return {"type": f"{kind}_url", f"{kind}_url": {"url": link}}
