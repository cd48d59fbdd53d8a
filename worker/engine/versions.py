"""What differs between the releases of vLLM that the worker runs with: 0.32, 0.31 and 0.30. Nothing else knows."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def _nothing(*_arguments: Any) -> None:
    """Stand in for what a release does without."""


def _first(name: str, *modules: str, missing: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Return the function of this name from the first of the modules that has it, or what to do without it."""
    for module in modules:
        try:
            function: Callable[..., Any] = getattr(import_module(module), name)
        except (ImportError, AttributeError):
            continue
        return function
    if missing is None:
        raise ImportError(f"this vLLM has no {name}; the worker runs with 0.32, 0.31 and 0.30")
    return missing


# Moved in 0.32.
load_chat_template = _first("load_chat_template", "vllm.renderers.chat_utils", "vllm.entrypoints.chat_utils")
# New in 0.32.
propagate_flash_late_interaction = _first(
    "propagate_flash_late_interaction", "vllm.entrypoints.launchers.cli_args", missing=_nothing
)
# New in 0.31.
configure_logging_from_args = _first("configure_logging_from_args", "vllm.logger", missing=_nothing)
