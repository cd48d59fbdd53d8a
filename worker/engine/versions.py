"""The differences between the supported releases of vLLM: 0.32, 0.31 and 0.30."""

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any


def _import(name: str, *modules: str, default: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Return the function `name` from the first of `modules` that has it, else `default`."""
    for module in modules:
        with suppress(ImportError, AttributeError):
            function: Callable[..., Any] = getattr(import_module(module), name)
            return function
    if default is None:
        raise ImportError(f"This release of vLLM has no {name}. The worker supports 0.32, 0.31 and 0.30.")
    return default


# Moved in 0.32.
load_chat_template = _import("load_chat_template", "vllm.renderers.chat_utils", "vllm.entrypoints.chat_utils")
# New in 0.32.
propagate_flash_late_interaction = _import(
    "propagate_flash_late_interaction", "vllm.entrypoints.launchers.cli_args", default=lambda *_: None
)
# New in 0.31.
configure_logging_from_args = _import("configure_logging_from_args", "vllm.logger", default=lambda *_: None)
