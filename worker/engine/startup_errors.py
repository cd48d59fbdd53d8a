"""Why an engine's process did not start: it tells only its log, where `worker.logs.CauseFile` writes it down."""

import re

from worker.errors import ConfigurationError, StartupError

PERMANENT = ("ValueError", "NotImplementedError", "ValidationError", "TypeError", "OutOfMemoryError")
"""What vLLM raises where the model and the settings do not go together, or the model does not fit."""
PERMANENT_WORDS = re.compile("no kernel image is available")
MEMORY = re.compile("out ?of ?memory|memory for the cache|KV cache memory|GPU memory utilization", re.IGNORECASE)
FITTING = "Lower MAX_MODEL_LEN or MAX_NUM_SEQS, choose a quantized variant, or give it more or larger GPUs."


def refusal(error: Exception, told: str) -> StartupError:
    """Return the error for what vLLM refuses in this process: all but the disk, the network and CUDA will stay so."""
    may_pass = isinstance(error, OSError | RuntimeError) and not isinstance(error, NotImplementedError)
    return StartupError(told) if may_pass and not PERMANENT_WORDS.search(told) else ConfigurationError(told)


def failure(told: str, cause: str | None) -> StartupError:
    """Return the error for a start that failed with `told`, where a process gave `cause` as `TYPE: MESSAGE`."""
    if cause is None:
        return StartupError(f"The engine did not start: {told}")
    kind, _, message = cause.partition(": ")
    is_permanent = kind in PERMANENT or PERMANENT_WORDS.search(message)
    remedy = f" {FITTING}" if MEMORY.search(cause) else ""
    wrong = ConfigurationError if is_permanent else StartupError
    return wrong(f"The engine did not start: {message or kind}{remedy}")
