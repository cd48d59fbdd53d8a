"""All errors that a caller or an operator reads, each with its HTTP status and OpenAI error type."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

Json = dict[str, Any]
Rejection = Literal["too_large", "refused", "refused_by_server", "invalid", "unreachable", "timeout", "busy"]


class StartupError(Exception):
    """The worker cannot start or go on. Exit code 1: another attempt may succeed."""

    exit_code: ClassVar[int] = 1


class EngineDiedError(StartupError):
    """The engine has died. The worker exits, because RunPod replaces only workers that exit."""

    def __init__(self) -> None:
        super().__init__("The engine has died. The worker exits so that RunPod replaces it.")


class ConfigurationError(StartupError):
    """A setting is wrong. Exit code 2: no attempt succeeds until somebody changes it."""

    exit_code: ClassVar[int] = 2


class JobError(Exception):
    """A request failed. The fields are those of OpenAI's error object, with the values that vLLM uses."""

    status = 500
    """The status of the HTTP response."""
    type = "InternalServerError"
    headers: Mapping[str, str] = MappingProxyType({})
    """More headers for the HTTP response."""

    def __init_subclass__(cls, **fields: Any) -> None:
        """Take the class's fields from its keywords, such as `status=400`."""
        super().__init_subclass__()
        for name, value in fields.items():
            setattr(cls, name, value)

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def error(self) -> Json:
        """Return OpenAI's error object: `message`, `type`, `param`, `code`."""
        return {"message": str(self), "type": self.type, "param": self.param, "code": self.status}

    def body(self) -> Json:
        """Return the body of the HTTP response."""
        return {"error": self.error()}


class InvalidRequestError(JobError, status=400, type="BadRequestError"):
    """The job's input has none of the accepted shapes."""


class RouteNotFoundError(JobError, status=404, type="NotFoundError"):
    """The worker does not offer this route."""

    def __init__(self, path: str, routes: Iterable[str]) -> None:
        super().__init__(f"No route {path!r}. Available routes: {', '.join(routes)}.")


class NotHeadError(JobError, status=421, type="NotFoundError"):
    """The machine is a follower in a cluster, and takes no requests."""

    def __init__(self, node: str, head: str) -> None:
        super().__init__(f"This is {node}, which takes no requests. Send them to the head of the cluster: {head}.")


class NotOfThisModelError(JobError, status=404, type="NotFoundError"):
    """The route exists only for another kind of model."""

    def __init__(self, path: str) -> None:
        super().__init__(f"The loaded model does not support {path!r}.")


class MethodNotAllowedError(JobError, status=405, type="BadRequestError"):
    """The route exists, but for another method."""

    def __init__(self, method: str, expected: str, path: str) -> None:
        super().__init__(f"{path!r} does not accept {method}. Use {expected}.")
        self.headers = MappingProxyType({"allow": expected})


class UnauthorizedError(JobError, status=401, type="AuthenticationError", headers={"www-authenticate": "Bearer"}):
    """The caller sent no API key, or a wrong one."""

    def __init__(self) -> None:
        super().__init__(
            "The API key is missing or wrong. Send one of the keys in WORKER_API_KEY as 'Authorization: Bearer KEY' or "
            "'x-api-key: KEY'."
        )


class HostNotAllowedError(JobError, status=403, type="PermissionDeniedError"):
    """The Host header names a host that is not the worker's. Web pages that attack local servers send such requests."""

    def __init__(self) -> None:
        super().__init__(
            "The Host header is not in ALLOWED_HOSTS. A worker that listens on a loopback address without "
            "WORKER_API_KEY accepts no other name. Add the name to ALLOWED_HOSTS, or set WORKER_API_KEY."
        )


class HeadTooLargeError(JobError, status=431, type="BadRequestError", headers={"connection": "close"}):
    """The request line and the headers are too large or too many."""

    def __init__(self, size: int, count: int) -> None:
        super().__init__(f"The request has more than {size} bytes or {count} headers before its body. Send fewer.")


class BodyTooLargeError(JobError, status=413, type="BadRequestError", headers={"connection": "close"}):
    """The request body is too large."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"The request body has more than MAX_REQUEST_BYTES={limit} bytes. Send links or smaller media, or raise it."
        )


class BodyTooSlowError(JobError, status=408, type="TimeoutError", headers={"connection": "close"}):
    """The request body did not arrive in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"The request body did not arrive within {seconds:g} s.")


class BusyError(JobError, status=429, type="RateLimitError", headers={"retry-after": "1"}):
    """The worker has as many requests, or as many bytes of them, as it accepts."""


class MemoryBusyError(BusyError, headers={"retry-after": "1", "connection": "close"}):
    """The other requests leave too little memory for this one."""

    def __init__(self, held: int, limit: int) -> None:
        super().__init__(
            f"The requests of this worker hold {held / 1e6:.0f} MB, and MAX_TOTAL_REQUEST_BYTES={limit} leaves no room "
            "for this one. Try again in a second, or send fewer or smaller media."
        )


class MemoryExceededError(JobError, status=413, type="BadRequestError", headers={"connection": "close"}):
    """The request needs more memory than all requests together may have."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"The request, with its decoded media, needs more memory than MAX_TOTAL_REQUEST_BYTES={limit} allows. "
            "Send fewer or smaller media, or raise the limit."
        )


class UnavailableError(JobError, status=503, type="ServiceUnavailableError", headers={"retry-after": "5"}):
    """The worker cannot answer now: it is starting or stopping, or its engine has died."""


class TooManyConnectionsError(UnavailableError, headers={"retry-after": "5", "connection": "close"}):
    """All connections that the worker accepts have requests."""

    def __init__(self) -> None:
        super().__init__("The worker has no connection left. Try again in a few seconds.")


LOADING = "The worker is loading its model. Try again in a few seconds."
LEAVING = "The worker is shutting down. Send the request again: another worker will answer it."
ENGINE_DIED = "The worker's engine has died. Send the request again: another worker will answer it."


class StartFailedError(JobError, status=503, type="ServiceUnavailableError"):
    """The worker cannot start until somebody changes its settings."""

    def __init__(self, cause: str) -> None:
        super().__init__(f"The worker cannot start until its settings are changed: {cause}")


class MediaError(JobError, status=400, type="BadRequestError"):
    """An image, video or sound that cannot be used. The message never reveals the content behind a link."""

    reason: ClassVar[Rejection] = "invalid"


class RefusedLinkError(MediaError, status=403, type="PermissionDeniedError", reason="refused"):
    """The worker does not follow this link."""


class MediaTooLargeError(MediaError, status=413, reason="too_large"):
    """The media exceed a limit: bytes, pixels, seconds or number of parts."""


class MediaBusyError(MediaError, status=429, type="RateLimitError", reason="busy", headers={"retry-after": "1"}):
    """The other requests leave no memory for these media."""


class LinkServerRefusedError(MediaError, status=422, type="UnprocessableEntityError", reason="refused_by_server"):
    """The link's server answered with a 4xx status."""


class UnreachableError(MediaError, status=424, type="FailedDependencyError", reason="unreachable"):
    """The link's server cannot be reached or has failed."""


class TooSlowError(MediaError, status=504, type="TimeoutError", reason="timeout"):
    """The link's content did not arrive in time."""


class JobTimeoutError(JobError, status=504, type="TimeoutError"):
    """The request took longer than REQUEST_TIMEOUT."""

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"The request was ended after REQUEST_TIMEOUT={seconds:g} s. Ask for fewer tokens, or raise the limit."
        )


NO_RETRY = MappingProxyType({"x-should-retry": "false"})
"""Keeps OpenAI's clients from sending a request again, as they do after 409 and 5xx."""


class BatchOutputError(JobError, status=507, type="InsufficientStorageError"):
    """The results of a batch cannot be written: the disk is full or fails."""


class StorageError(BatchOutputError, headers=NO_RETRY):
    """The files and batches of HTTP callers cannot be read or written."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"BATCH_FOLDER cannot be used: {reason}. Delete files that you do not need, or ask the operator to check "
            "the disk. Then try again."
        )


class BatchFullError(JobError, status=507, type="InsufficientStorageError", headers=NO_RETRY):
    """There is no room for another file or batch."""


class UploadTooLargeError(JobError, status=413, type="BadRequestError", headers={"connection": "close"}):
    """The body of a request about files or batches is too large."""

    def __init__(self, limit: int, setting: str = "") -> None:
        if setting:
            most, advice = f"{setting}={limit}", "Send several smaller files, or compress it with gzip or zstd."
        else:
            most, advice = str(limit), "Upload the requests as a file, and send its id as 'input_file_id'."
        super().__init__(f"The body has more than {most} bytes. {advice}")


class BatchesOffError(JobError, status=404, type="NotFoundError"):
    """The worker keeps no files for HTTP callers."""

    def __init__(self, path: str) -> None:
        super().__init__(
            f"{path!r} needs the setting BATCH_FOLDER, which this worker does not have. Set it to a folder on the "
            "network volume, such as '/runpod-volume/batch-files'."
        )


class BatchObjectNotFoundError(JobError, status=404, type="NotFoundError"):
    """The caller's API key has no such file or batch."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"No {kind} {name[:100]!r} of this API key.", param="id")


class BatchBusyError(JobError, status=409, type="ConflictError", headers=NO_RETRY):
    """The file or batch is in a state in which this cannot be done."""


class ResultRefusedError(JobError, status=413):
    """RunPod does not accept an output, mostly because it is too large. Without `answer` it was not even sent.

    `failures` are the reasons for which it could not be stored elsewhere.
    """

    def __init__(self, size: int, answer: int | None = None, failures: Iterable[str] = ()) -> None:
        self.size = size
        self.answer = answer
        sentences = [f"RunPod does not accept {size / 1e6:.1f} MB of output{f' (HTTP {answer})' if answer else ''}."]
        if failures := list(failures):
            sentences += ["It could not be stored elsewhere.", *failures]
        if size > 1_000_000 and self.may_be_stored:
            sentences.append(
                "A result may have at most 20 MB. Ask for fewer tokens or log probabilities. To get larger results as "
                "links, send 'upload_url' in the job's input or 's3Config' beside it, or set BUCKET_ENDPOINT_URL or "
                "RESULT_FOLDER."
            )
        super().__init__(" ".join(sentences))

    @property
    def may_be_stored(self) -> bool:
        """Whether the output was refused, not the job: 404 and 410 mean that RunPod does not know the job any more."""
        return self.answer not in (404, 410)


class InternalError(JobError):
    """An unforeseen error. The log has the cause under the request's id; the response does not."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"The worker failed while it handled request {request_id}. Its log has the cause.")


def status_of(value: object) -> int | None:
    """Return the status in an engine's error object, as body or as a stream's chunk; None if `value` is no error."""
    error = value.get("error") if isinstance(value, dict) else None
    if not isinstance(error, dict):
        return None
    code = error.get("code")
    return code if isinstance(code, int) else 500


class EngineResponseError(JobError):
    """The engine answered with an error. Its own body is passed on unchanged."""

    def __init__(self, status: int, body: Json) -> None:
        self._error = body["error"]
        super().__init__(str(self._error.get("message")), param=self._error.get("param"))
        self.status = status
        self._body = body

    def error(self) -> Json:
        """Return the engine's error object, completed with the fields that Anthropic's format lacks."""
        return {**super().error(), **self._error}

    def body(self) -> Json:
        """Return the engine's body."""
        return self._body
