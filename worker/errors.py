"""Everything that may go wrong in words that a caller or an operator can act on."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from worker.request.routes import ROUTES

Json = dict[str, Any]
Rejection = Literal["too_large", "refused", "refused_by_server", "invalid", "unreachable", "timeout"]


class WorkerError(Exception):
    """Base of all errors whose message is meant to be read outside the worker's own log."""


class StartupError(WorkerError):
    """The worker cannot start or go on; `exit_code` 1 says that another try may succeed."""

    exit_code: ClassVar[int] = 1


class EngineDiedError(StartupError):
    """The engine is gone; the platform replaces a worker that leaves, and only that."""

    def __init__(self) -> None:
        super().__init__("The engine has died; the worker leaves, so that it is replaced.")


class ConfigurationError(StartupError):
    """A setting is wrong: no other try succeeds until somebody changes it."""

    exit_code: ClassVar[int] = 2


class JobError(WorkerError):
    """A job failed. The fields are those of OpenAI's error object, as vLLM fills them."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "InternalServerError"
    headers: Mapping[str, str] = MappingProxyType({})
    """What an HTTP answer carries besides."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def error(self) -> Json:
        """Return OpenAI's error object: `message`, `type`, `param`, `code`."""
        return {"message": str(self), "type": self.type, "param": self.param, "code": self.status}

    def body(self) -> Json:
        """Return the body of an HTTP answer with this error."""
        return {"error": self.error()}

    @property
    def http_status(self) -> int:
        """The status of that answer."""
        return self.status


class InvalidRequestError(JobError):
    """The job's input fits no accepted shape."""

    status = 400
    type = "BadRequestError"


class RouteNotFoundError(JobError):
    """The job asks for a route that the worker does not offer."""

    status = 404
    type = "NotFoundError"

    def __init__(self, path: str, routes: Iterable[str] = ROUTES) -> None:
        super().__init__(f"No route {path!r}. Routes: {', '.join(routes)}.")


class NotOfThisModelError(JobError):
    """The route is there for models of another kind."""

    status = 404
    type = "NotFoundError"

    def __init__(self, path: str) -> None:
        super().__init__(f"The model that is loaded does not answer {path!r}, which is for models of another kind.")


class MethodNotAllowedError(JobError):
    """The route is there, for another method."""

    status = 405
    type = "BadRequestError"

    def __init__(self, method: str, expected: str, path: str) -> None:
        super().__init__(f"{path!r} is called with {expected}, not with {method}.")
        self.headers = MappingProxyType({"allow": expected})


class UnauthorizedError(JobError):
    """The caller has no key, or a wrong one."""

    status = 401
    type = "AuthenticationError"
    headers = MappingProxyType({"www-authenticate": "Bearer"})

    def __init__(self) -> None:
        super().__init__(
            "The API key is missing or wrong. Send one of WORKER_API_KEY's as 'Authorization: Bearer KEY'."
        )


class BodyTooLargeError(JobError):
    """The body is larger than the worker reads."""

    status = 413
    type = "BadRequestError"
    headers = MappingProxyType({"connection": "close"})

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"The body has more than MAX_REQUEST_BYTES={limit} bytes. Send media as links, or smaller, or raise it."
        )


class BodyTooSlowError(JobError):
    """The body did not arrive in time."""

    status = 408
    type = "TimeoutError"
    headers = MappingProxyType({"connection": "close"})

    def __init__(self, seconds: float) -> None:
        super().__init__(f"The body did not arrive within {seconds:g} s.")


class BusyError(JobError):
    """The worker has as many requests as it takes."""

    status = 429
    type = "RateLimitError"
    headers = MappingProxyType({"retry-after": "1"})

    def __init__(self, running: int) -> None:
        super().__init__(
            f"The worker has {running} requests, as many as MAX_CONCURRENCY and MAX_QUEUE allow. Try again in a second."
        )


class UnavailableError(JobError):
    """The worker cannot answer now: it is loading its model, leaving, or its engine is dead."""

    status = 503
    type = "ServiceUnavailableError"
    headers = MappingProxyType({"retry-after": "5"})


ENGINE_DIED = "The worker's engine has died, and the worker leaves. Send the request again: another one will answer."
LEAVING = "The worker has been told to leave before this was done. Send the request again: another one will answer."


class StartFailedError(JobError):
    """The worker can never answer: what it has been told is wrong, and somebody has to change it."""

    status = 503
    type = "ServiceUnavailableError"

    def __init__(self, cause: str) -> None:
        super().__init__(f"The worker cannot start, and will not until its settings are changed: {cause}")


class MediaError(JobError):
    """An image, a video or a sound that cannot be had or used; the message never tells what was found behind a link."""

    status = 400
    type = "BadRequestError"
    reason: ClassVar[Rejection] = "invalid"


class RefusedLinkError(MediaError):
    """The link leads where the worker does not go."""

    status = 403
    type = "PermissionDeniedError"
    reason = "refused"


class MediaTooLargeError(MediaError):
    """There is more of it than is allowed: bytes, pixels, seconds or pieces."""

    status = 413
    reason = "too_large"


class LinkServerRefusedError(MediaError):
    """The link's server says that there is nothing to have."""

    status = 422
    type = "UnprocessableEntityError"
    reason = "refused_by_server"


class UnreachableError(MediaError):
    """The link's server cannot be reached or has failed."""

    status = 424
    type = "FailedDependencyError"
    reason = "unreachable"


class TooSlowError(MediaError):
    """What is behind the link did not arrive in time."""

    status = 504
    type = "TimeoutError"
    reason = "timeout"


class JobTimeoutError(JobError):
    """The job took longer than the worker is told to allow."""

    status = 504
    type = "TimeoutError"

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"The request was ended after REQUEST_TIMEOUT={seconds:g} s. Ask for fewer tokens, or raise it."
        )


class ResultTooLargeError(JobError):
    """The platform does not take so large a result."""

    status = 413

    def __init__(self, size: int) -> None:
        super().__init__(
            f"The result has {size / 1e6:.1f} MB, which is more than RunPod takes. Ask for a stream, for fewer tokens, "
            "or for fewer log probabilities."
        )


class InternalError(JobError):
    """Something unforeseen; the cause is in the log under the request's id, never in the answer."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"The worker failed while it handled request {request_id}. Its log has the cause.")


class EngineResponseError(JobError):
    """The engine answered with an error, whose own body goes to clients that read bodies."""

    def __init__(self, status: int, body: Json) -> None:
        self._error = body["error"]
        super().__init__(str(self._error.get("message")), param=self._error.get("param"))
        self._status = status
        self._body = body

    def error(self) -> Json:
        """Return the engine's error object, with the fields that Anthropic's lacks."""
        return {**super().error(), "code": self._status, **self._error}

    def body(self) -> Json:
        """Return the engine's body unchanged."""
        return self._body

    @property
    def http_status(self) -> int:
        """The engine's status."""
        return self._status if isinstance(self._status, int) else self.status
