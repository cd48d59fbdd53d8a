"""The field `batch` of a job's input: what to read, where to write, and how."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from worker.batch.output import Order
from worker.errors import InvalidRequestError
from worker.settings import Settings

FIELD = "batch"
DEFAULT_PRIORITY = 100
"""The priority of lines. Other requests have 0, and a lower number is earlier."""
SHAPE = (
    "A batch is {'batch': {'input': a link, a path on the volume, a list of lines, or base64, 'output'?: a path on the "
    "volume or a link presigned for PUT, 'errors'?: a path on the volume, 'order'?: 'input' or 'ended', "
    "'concurrency'?: a number, 'priority'?: a number}}."
)

_LINK = re.compile(r"https?://", re.IGNORECASE)
# White space can match in one place only. Otherwise a long text would be tried at each of its spaces.
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+(?:={1,2}\s*)?")
_LONGEST_PATH = 4096

Kind = Literal["link", "path", "list", "base64"]
_Text = Annotated[str, Field(min_length=1)]


class BatchSpec(BaseModel):
    """What the caller wants. Paths are relative to the volume."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    input: _Text | Annotated[list[Any], Field(min_length=1)]
    output: _Text | None = None
    errors: _Text | None = None
    order: Order = "input"
    concurrency: Annotated[int, Field(ge=1)] | None = None
    """The most lines in flight. None: as many as keep the engine busy."""
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = DEFAULT_PRIORITY

    @property
    def upload_link(self) -> str | None:
        """The link to which the output is uploaded."""
        return self.output if self.output and _LINK.match(self.output) else None

    def input_kind(self, volume: "Volume") -> Kind:
        """Return what the input is. A text that could be base64 is a path if there is such a file."""
        if isinstance(self.input, list):
            return "list"
        if _LINK.match(self.input):
            return "link"
        if self.input.startswith("data:") or (_BASE64.fullmatch(self.input) and not volume.has_file(self.input)):
            return "base64"
        return "path"


def is_batch(job_input: object) -> bool:
    """Return whether a job's input asks for a batch."""
    return isinstance(job_input, dict) and FIELD in job_input


def read(job_input: dict[str, Any]) -> BatchSpec:
    """Return the batch in a job's input.

    Raises:
        InvalidRequestError: a field is missing, unknown or wrong; the message names it and what is accepted.
    """
    if beside := sorted(map(str, job_input.keys() - {FIELD})):
        raise InvalidRequestError(f"{beside[0][:100]!r} must not stand beside 'batch'. {SHAPE}", param=beside[0][:100])
    value = job_input[FIELD]
    if not isinstance(value, dict):
        raise InvalidRequestError(f"'batch' must be an object. {SHAPE}", param=FIELD)
    try:
        return BatchSpec.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = str(first["loc"][0])[:100]
    if field not in value:
        problem = f"'batch.{field}' is missing."
    elif field not in BatchSpec.model_fields:
        problem = f"'batch.{field}' is an unknown field."
    else:
        problem = f"'batch.{field}' is wrong: {first['msg']}."
    raise InvalidRequestError(f"{problem} {SHAPE}", param=f"batch.{field}")


class Volume:
    """The folder in which callers may read and write files: the network volume."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def of(cls, settings: Settings) -> "Volume":
        """Return the volume of the settings, which need not exist."""
        return cls(settings.volume)

    @property
    def exists(self) -> bool:
        """Whether there is a volume."""
        return self._folder.is_dir()

    @property
    def own_folder(self) -> Path:
        """Where batches without a path of their own keep their results."""
        return self._folder / "batches"

    def has_file(self, text: str) -> bool:
        """Return whether a path of a caller leads to a file on the volume."""
        try:
            return self.exists and len(text) <= _LONGEST_PATH and self.path(text, "input").is_file()
        except (InvalidRequestError, OSError):
            # Base64 is too long for a name.
            return False

    def path(self, text: str, field: str) -> Path:
        """Return a caller's path without symbolic links. It need not exist.

        Raises:
            InvalidRequestError: there is no volume, or the path leads out of it.
        """
        param = f"{FIELD}.{field}"
        if not self.exists:
            raise InvalidRequestError(
                f"'{param}' is a path, but this worker has no network volume at {self._folder}. Attach one to the "
                "endpoint, or use a link.",
                param=param,
            )
        root = self._folder.resolve()
        try:
            path = (root / text).resolve()
        except (ValueError, OSError, RuntimeError):
            # A null character, or symbolic links that lead to each other.
            path = root
        if path == root or not path.is_relative_to(root):
            raise InvalidRequestError(
                f"'{param}' must be the path of a file on the network volume, {self._folder}. It may be relative to "
                "it, and must not lead out of it.",
                param=param,
            )
        if field in ("output", "errors") and path.suffix != ".jsonl":
            # So that no caller can write a file that others run or load.
            raise InvalidRequestError(f"'{param}' must end with '.jsonl'.", param=param)
        return path
