"""Fills vLLM's cache of what it finds out about model classes: a start that has to look takes ten seconds longer.

Run while the image is built, without a GPU; `VLLM_CACHE_ROOT` says where the cache is.
"""

import sys
from collections.abc import Callable
from typing import Any

from vllm.model_executor.models import registry


def main() -> int:
    """Look at every model class that vLLM knows; fail when hardly any can be looked at."""
    # Each in a process of its own, as vLLM does it where CUDA may be in use, would take an hour.
    registry._run_in_subprocess = _here  # type: ignore[assignment, attr-defined, unused-ignore]
    seen, failed = 0, []
    for name, model in registry.ModelRegistry.models.items():
        try:
            model.inspect_model_cls()
            seen += 1
        except Exception as error:  # noqa: BLE001 - a class may want anything that is not installed
            failed.append(f"{name} ({type(error).__name__})")
    sys.stdout.write(f"{seen} model classes; failed: {', '.join(failed) or 'none'}\n")
    return int(seen < len(failed))


def _here(inspect: Callable[[], Any]) -> Any:
    return inspect()


if __name__ == "__main__":
    sys.exit(main())
