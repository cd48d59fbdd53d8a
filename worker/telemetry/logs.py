"""One format for all log lines: the worker's, those of all vLLM processes, and the RunPod SDK's. All go to stderr.

stdout is kept for the result of a local run.
"""

import copy
import logging
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TextIO

from worker import redaction

Format = Literal["json", "text"]

PROMPT_LOGGER = "vllm.entrypoints.serve.utils.request_logger"
"""vLLM's logger for prompts and completions, at level DEBUG, if request logging is on."""

SERVER_LOGGER = "uvicorn.error"
"""uvicorn's logger, which warns about each request that is not HTTP."""
LINK_LOGGER = "vllm.connections"
"""vLLM's logger for media links. Its warnings contain the links' query strings, which may hold keys."""

_FORMATTERS: dict[Format, dict[str, Any]] = {
    "json": {
        "()": "pythonjsonlogger.json.JsonFormatter",
        "fmt": "%(levelname)s %(name)s %(process)d %(message)s",
        "rename_fields": {
            "levelname": "level",
            "name": "logger",
            "process": "pid",
            "vllm_process_name": "process",
            "exc_info": "traceback",
        },
        "timestamp": True,
        "json_ensure_ascii": False,
    },
    "text": {"format": "%(levelname)-7s %(asctime)s %(name)s: %(message)s"},
}
_SDK_LEVELS = {"TRACE": logging.DEBUG, "DEBUG": logging.DEBUG, "WARN": logging.WARNING, "ERROR": logging.ERROR}

CLIENT_ERRORS = {"VLLMClientError", "GracefulHTTPError"}
"""vLLM's errors for mistakes of the caller. Their messages may quote the request."""


class NoClientErrors(logging.Filter):
    """Drops log records of errors that are the caller's own. Some of vLLM's routes log them."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to keep the record."""
        error = record.exc_info[1] if record.exc_info else None
        return not CLIENT_ERRORS & {base.__name__ for base in type(error).__mro__}


class FewWarnings(logging.Filter):
    """Limits the warnings of libraries, so that one request cannot fill the log.

    From each place in the source, 5 warnings a minute are kept, and 1,000 characters of each. Python's own warnings all
    come from one place: from `logging.captureWarnings`. The worker's warnings, and the SDK's, are not limited.
    """

    PER_MINUTE = 5
    CHARACTERS = 1000
    UNLIMITED = ("worker", "runpod")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._counts: dict[tuple[str, int], tuple[float, int]] = {}
        """The start of the current minute and the number of warnings in it, for each file and line."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to keep the record; shorten its message."""
        if record.levelno != logging.WARNING or record.name.partition(".")[0] in self.UNLIMITED:
            return True
        place, now = (record.pathname, record.lineno), self._clock()
        began, count = self._counts.get(place, (now, 0))
        dropped = max(0, count - self.PER_MINUTE)
        if now - began >= 60:
            began, count = now, 0
        self._counts[place] = (began, count + 1)
        if count >= self.PER_MINUTE:
            return False
        notes = f" ({dropped} more were dropped)" if count == 0 and dropped else ""
        if count == self.PER_MINUTE - 1:
            notes += " (further ones are dropped for a minute)"
        record.msg, record.args = record.getMessage()[: self.CHARACTERS] + notes, ()
        return True


class Stderr(logging.StreamHandler[TextIO]):
    """Writes log lines to stderr, without the secrets in the settings."""

    def __init__(self, secrets: Sequence[str]) -> None:
        super().__init__()
        self._remove = redaction.remover(secrets)

    def format(self, record: logging.LogRecord) -> str:
        """Return the log line. Secrets are removed from message, traceback and texts in `extra`."""
        record = copy.copy(record)
        record.msg, record.args = record.getMessage(), ()
        if record.exc_info:
            record.exc_text, record.exc_info = logging.Formatter().formatException(record.exc_info), None
        texts = {name: self._remove(value) for name, value in vars(record).items() if isinstance(value, str)}
        vars(record).update(texts)
        return super().format(record)


class CauseFile(logging.Handler):
    """Writes the first exception that any process logs to a file, as `TYPE: MESSAGE` without secrets."""

    def __init__(self, path: str, secrets: Sequence[str]) -> None:
        super().__init__(logging.ERROR)
        self._path = Path(path)
        self._remove = redaction.remover(secrets)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record's exception, if it has one and the file does not exist yet."""
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            # The file may exist already, or the disk may be full: neither matters for the log.
            with suppress(OSError), self._path.open("x") as file:
                file.write(f"{type(error).__name__}: {self._remove(' '.join(str(error).split()))}")


def first_cause(file: Path) -> str | None:
    """Return what a `CauseFile` has written to its file, or None."""
    return file.read_text() if file.is_file() else None


def configuration(
    form: Format,
    level: str,
    vllm_level: str,
    log_prompts: bool,
    cause: Path | None = None,
    secrets: Sequence[str] = (),
) -> dict[str, Any]:
    """Return a dictionary for `logging.config.dictConfig`, plain enough to be a JSON file that vLLM reads.

    The first logged exception is written to the file `cause`. `secrets` are removed from all log lines; the dictionary
    contains them.
    """
    # At level DEBUG the SDK logs the input and output of every job.
    sdk_level = "INFO" if level == "DEBUG" and not log_prompts else level
    levels = {"worker": level, "runpod": sdk_level, "vllm": vllm_level, LINK_LOGGER: "ERROR", SERVER_LOGGER: "ERROR"}
    if log_prompts:
        levels[PROMPT_LOGGER] = "DEBUG"
    hidden = {"secrets": list(secrets)}
    handlers: dict[str, Any] = {
        "stderr": {"()": f"{__name__}.{Stderr.__name__}", "formatter": "line", "filters": ["callers", "few"], **hidden}
    }
    if cause is not None:
        handlers["cause"] = {"()": f"{__name__}.{CauseFile.__name__}", "path": str(cause), **hidden}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": _FORMATTERS[form]},
        "filters": {
            "callers": {"()": f"{__name__}.{NoClientErrors.__name__}"},
            "few": {"()": f"{__name__}.{FewWarnings.__name__}"},
        },
        "handlers": handlers,
        "loggers": {name: {"level": level, "handlers": [], "propagate": True} for name, level in levels.items()},
        "root": {"handlers": list(handlers), "level": "WARNING"},
    }


def frames(error: BaseException) -> str:
    """Return the traceback of an error and its causes without their messages, which may quote a user."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    before = f"{frames(cause)}\n" if cause else ""
    return before + "".join([*traceback.format_tb(error.__traceback__), type(error).__qualname__])


def log_for_sdk(_sdk_logger: object, message: object, message_level: str = "INFO", job_id: str | None = None) -> None:
    """Replace the SDK's `RunPodLogger.log`, which prints to stdout in two formats of its own."""
    level = _SDK_LEVELS.get(message_level, logging.INFO)
    logging.getLogger("runpod").log(level, "%s", message, extra={"request_id": job_id} if job_id else None)
