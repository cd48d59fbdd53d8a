"""The path of the embedded model and the worker's settings for it."""

import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
MODEL = ROOT / "tests/models/tiny-vlm"


def environment() -> dict[str, str]:
    """Return the variables of tests/models/tiny-vlm.env."""
    lines = MODEL.with_suffix(".env").read_text()
    return dict(pair.split("=", 1) for pair in shlex.split(lines, comments=True))
