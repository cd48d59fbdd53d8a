"""OpenAI's objects for files and batches, and how a batch's state changes. Pure but for random ids."""

import re
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from worker.batch.progress import Counts
from worker.errors import InvalidRequestError, Json
from worker.request.routes import ROUTES, method_of

End = Literal["failed", "completed", "expired", "cancelled"]
Status = Literal["validating", "in_progress", "finalizing", "cancelling", End]

FILE_ID = re.compile(r"file-[0-9a-f]{32}(-output|-errors)?")
BATCH_ID = re.compile(r"batch_[0-9a-f]{32}")
WINDOW = "24h"
HOUR, DAY = 3600, 86_400


class _Object(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class FileObject(_Object):
    """A file. `filename` is the caller's, and only data."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"
    status_details: None = None

    def public(self) -> Json:
        """Return what callers see."""
        return self.model_dump(mode="json")


class Mistake(_Object):
    """A reason for which a batch failed."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Mistakes(_Object):
    """All of them."""

    object: Literal["list"] = "list"
    data: tuple[Mistake, ...]


class RequestCounts(_Object):
    """The lines of a batch. `total` is 0 until they were counted."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class Tokens(_Object):
    """The tokens of all answers of a batch."""

    input_tokens: int
    output_tokens: int
    total_tokens: int


class BatchObject(_Object):
    """A batch."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None = None
    errors: Mistakes | None = None
    input_file_id: str
    completion_window: str = WINDOW
    status: Status = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = RequestCounts()
    usage: Tokens | None = None
    metadata: dict[str, str] | None = None
    output_seconds: int | None = None
    """How long the caller wants to keep the output. Not part of OpenAI's object."""

    def public(self) -> Json:
        """Return what callers see."""
        return self.model_dump(mode="json", exclude={"output_seconds"})

    @property
    def key(self) -> str:
        """The key of the batch's results, and the part that its id shares with those of its output files."""
        return self.id.removeprefix("batch_")

    @property
    def output_id(self) -> str:
        """The id of the file of results. The file exists for callers once the batch has ended."""
        return f"file-{self.key}-output"

    @property
    def errors_id(self) -> str:
        """The same for the file of lines that failed."""
        return f"file-{self.key}-errors"

    @property
    def ended_at(self) -> int | None:
        """When it ended; None before."""
        return self.failed_at or self.completed_at or self.expired_at or self.cancelled_at

    def moved(self, status: Status, now: int, **fields: Any) -> "BatchObject":
        """Return the batch in another state. The time of its first entry into each state is kept."""
        at = f"{status}_at"
        return self.model_copy(update={"status": status, at: getattr(self, at) or now, **fields})

    def counted(self, counts: Counts, total: int) -> "BatchObject":
        """Return the batch with other counts."""
        lines = RequestCounts(total=max(total, counts.done), completed=counts.completed, failed=counts.failed)
        tokens_in, tokens_out = counts.tokens_in, counts.tokens_out
        usage = Tokens(input_tokens=tokens_in, output_tokens=tokens_out, total_tokens=tokens_in + tokens_out)
        return self.model_copy(update={"request_counts": lines, "usage": usage})


class Expiry(_Object):
    """When a file is to be removed."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=HOUR, le=30 * DAY)]


class BatchRequest(BaseModel):
    """The body of `batches.create`. Unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    output_expires_after: Expiry | None = None

    @classmethod
    def read(cls, body: bytes) -> "BatchRequest":
        """Return the request in a body.

        Raises:
            InvalidRequestError: a field is missing or wrong; the message names it.
        """
        try:
            request = cls.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            field = ".".join(map(str, first["loc"]))[:100] or None
            name = f"'{field}'" if field else "The body"
            raise InvalidRequestError(f"{name} is wrong: {first['msg']}.", param=field) from None
        if method_of(request.endpoint) != "POST":
            routes = ", ".join(route for route, method in ROUTES.items() if method == "POST")
            raise InvalidRequestError(f"'endpoint' must be one of {routes}.", param="endpoint")
        return request


def new_key(now: float) -> str:
    """Return 32 hexadecimal digits that nobody can guess. Later ones are greater: the first 12 are the time."""
    return f"{int(now * 1000):012x}{secrets.token_hex(10)}"
