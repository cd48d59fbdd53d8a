"""The worker's own programs, which run beside it."""

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def start(module: str, *arguments: str, environ: Mapping[str, str], **options: Any) -> "subprocess.Popen[Any]":
    """Run a module of this package, wherever the worker was started, with `environ` for its environment."""
    return subprocess.Popen(  # noqa: S603 - our own code
        [sys.executable, "-m", module, *arguments],
        env={**environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        **options,
    )
