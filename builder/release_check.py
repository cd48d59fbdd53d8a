"""`make release-check`: everything that must hold before a release, one after the other, and one table of how it went.

Takes about an hour, most of it the soak; `RELEASE="check test"` runs only those gates.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from worker import __version__

GATES: dict[str, list[str]] = {
    "check": ["make", "check"],
    "generated": ["make", "generated"],
    "test": ["make", "test"],
    "conformance 0.31.0": ["make", "conformance", "VLLM=0.31.0"],
    "conformance 0.30.0": ["make", "conformance", "VLLM=0.30.0"],
    "clients": ["make", "clients"],
    "monitoring": ["make", "monitoring"],
    "audit": ["make", "audit"],
    "fuzz": ["make", "fuzz"],
    "endurance": ["make", "endurance"],
    "soak": ["make", "soak"],
}
"""By name; the present vLLM's conformance is part of the tests."""


def main(chosen: list[str]) -> int:
    """Run the gates, print the table, and return 1 if one does not hold."""
    rows = [("version", _version() or "ok", 0.0), ("tree", _tree() or "ok", 0.0)]
    for name, command in GATES.items():
        if chosen and name.split()[0] not in chosen:
            continue
        sys.stdout.write(f"== {' '.join(command)}\n")
        sys.stdout.flush()
        began = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, check=False)
        rows.append((name, "ok" if done.returncode == 0 else f"exit code {done.returncode}", time.monotonic() - began))
    sys.stdout.write(f"\nRelease {__version__}\n")
    for name, result, seconds in rows:
        sys.stdout.write(f"{name:<20} {result:<50} {seconds:8.0f} s\n")
    return int(any(result != "ok" for _, result, _ in rows))


def _version() -> str | None:
    """Return what is wrong with the version, if anything is."""
    if not re.search(rf"^## \[{re.escape(__version__)}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE):
        return f"CHANGELOG.md has no section [{__version__}]"
    return f"v{__version__} has been released" if f"v{__version__}" in _git("tag").split() else None


def _tree() -> str | None:
    """Return what is wrong with the tree, if anything is."""
    return "not everything is committed" if _git("status", "--porcelain") else None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
