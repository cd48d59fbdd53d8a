"""How log lines look: the worker's, vLLM's in all its processes, and the SDK's, in one form, on stderr.

stdout is left to a local run's result.
"""

import logging
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

Format = Literal["json", "text"]

PROMPT_LOGGER = "vllm.entrypoints.serve.utils.request_logger"
"""The logger to which vLLM tells prompts and completions, at its DEBUG level, when it is asked to log requests."""

LINK_LOGGER = "vllm.connections"
"""The logger to which vLLM tells links to media, with whatever key is in their query, as warnings."""

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


CALLERS_ERRORS = {"VLLMClientError", "GracefulHTTPError"}
"""vLLM's classes of errors that are answered, and may quote what they answer."""


class NoCallersErrors(logging.Filter):
    """Leaves out what some of vLLM's routes log of an error that is the caller's own."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether the record is to be written."""
        error = record.exc_info[1] if record.exc_info else None
        return not CALLERS_ERRORS & {one.__name__ for one in type(error).__mro__}


class CauseFile(logging.Handler):
    """Writes the first exception that any process logs into a file, as `TYPE: MESSAGE`."""

    def __init__(self, path: str) -> None:
        super().__init__(logging.ERROR)
        self._path = Path(path)

    def emit(self, record: logging.LogRecord) -> None:
        """Write down the exception of a record, if it has one and is the first."""
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            # Nothing is worse off for a cause that nobody can write down, or that is there already.
            with suppress(OSError), self._path.open("x") as file:
                file.write(f"{type(error).__name__}: {' '.join(str(error).split())}")


def configuration(
    form: Format, level: str, vllm_level: str, log_prompts: bool, cause: Path | None = None
) -> dict[str, Any]:
    """Return a dictionary for `logging.config.dictConfig`, plain enough to be a JSON file that vLLM reads.

    The first exception that is logged is written to the file `cause`.
    """
    # The SDK tells every job's input and output at its DEBUG level.
    sdk_level = "INFO" if level == "DEBUG" and not log_prompts else level
    levels = {"worker": level, "runpod": sdk_level, "vllm": vllm_level, LINK_LOGGER: "ERROR"}
    if log_prompts:
        levels[PROMPT_LOGGER] = "DEBUG"
    handlers: dict[str, Any] = {
        "stderr": {
            "class": "logging.StreamHandler",
            "formatter": "line",
            "filters": ["callers"],
            "stream": "ext://sys.stderr",
        }
    }
    if cause is not None:
        handlers["cause"] = {"()": f"{__name__}.{CauseFile.__name__}", "path": str(cause)}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": _FORMATTERS[form]},
        "filters": {"callers": {"()": f"{__name__}.{NoCallersErrors.__name__}"}},
        "handlers": handlers,
        "loggers": {name: {"level": level, "handlers": [], "propagate": True} for name, level in levels.items()},
        "root": {"handlers": list(handlers), "level": "WARNING"},
    }


def frames(error: BaseException) -> str:
    """Return where an error and its causes were raised, and their types, but no message: it may quote a user."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    before = f"{frames(cause)}\n" if cause else ""
    return before + "".join([*traceback.format_tb(error.__traceback__), type(error).__qualname__])


def log_for_sdk(_sdk_logger: object, message: object, message_level: str = "INFO", job_id: str | None = None) -> None:
    """Stand in for the SDK's `RunPodLogger.log`, which prints to stdout in two forms of its own."""
    level = _SDK_LEVELS.get(message_level, logging.INFO)
    logging.getLogger("runpod").log(level, "%s", message, extra={"request_id": job_id} if job_id else None)


_SDK_LEVELS = {"TRACE": logging.DEBUG, "DEBUG": logging.DEBUG, "WARN": logging.WARNING, "ERROR": logging.ERROR}
