"""Errors at start-up: vLLM's exceptions as the worker's errors, permanent (exit code 2) or temporary (exit code 1)."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError
from vllm.exceptions import VLLMError

from worker.errors import ConfigurationError, StartupError

VLLM_ERRORS = (VLLMError, AssertionError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""The exceptions that vLLM raises for settings or a model that it cannot use."""
PERMANENT = ("ValueError", "NotImplementedError", "ValidationError", "TypeError", "OutOfMemoryError")
"""The exceptions of vLLM's processes that mean: the settings and the model do not match, or memory is too small."""
PERMANENT_WORDS = re.compile("no kernel image is available")
MEMORY = re.compile("out ?of ?memory|memory for the cache|KV cache memory|GPU memory utilization", re.IGNORECASE)
REMEDY = "Lower MAX_MODEL_LEN or MAX_NUM_SEQS, choose a quantized variant, or use more or larger GPUs."


@contextmanager
def translated() -> Iterator[None]:
    """Turn vLLM's exceptions into `ConfigurationError`, or `StartupError` if disk, network or CUDA may be the cause."""
    try:
        yield
    except VLLM_ERRORS as error:
        message = one_line(error)
        is_system_error = isinstance(error, OSError | RuntimeError) and not isinstance(error, NotImplementedError)
        is_temporary = is_system_error and not PERMANENT_WORDS.search(message)
        raise (StartupError if is_temporary else ConfigurationError)(message) from error


def failure(message: str, first_cause: str | None) -> StartupError:
    """Return the error for an engine process that did not start.

    `first_cause` is the first exception in the log, as `TYPE: MESSAGE` (`worker.telemetry.logs.CauseFile`): vLLM's own
    `message` seldom contains it.
    """
    if first_cause is None:
        return StartupError(f"The engine did not start: {message}")
    kind, _, cause = first_cause.partition(": ")
    is_permanent = kind in PERMANENT or PERMANENT_WORDS.search(cause)
    remedy = f" {REMEDY}" if MEMORY.search(first_cause) else ""
    error_class = ConfigurationError if is_permanent else StartupError
    return error_class(f"The engine did not start: {cause or kind}{remedy}")


def one_line(error: Exception) -> str:
    """Return an exception's message on one line; of pydantic's, all messages with the class and the field of each."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, (error.title, *each['loc'])))}: {each['msg']}" for each in error.errors())
    text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    return " ".join(text.split()) or type(error).__name__
