"""The worker's own programs, which run beside it, and whatever else it has started."""

import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import psutil

END_SECONDS = 2.0


def start(module: str, *arguments: str, environ: Mapping[str, str], **options: Any) -> "subprocess.Popen[Any]":
    """Run a module of this package, wherever the worker was started, with `environ` for its environment."""
    return subprocess.Popen(  # noqa: S603 - our own code
        [sys.executable, "-m", module, *arguments],
        env={**environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        **options,
    )


def end_all() -> None:
    """End every process that has been started, and all that they have: an engine's, and the SDK's that pings."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=END_SECONDS)
