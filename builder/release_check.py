"""`make release-check`: runs all checks that a release must pass, and prints a table of the results.

Takes about two hours, most of it for the soak test and the simulation. `RELEASE="check coverage"` runs only these two.
"""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from builder.release_notes import notes
from worker import __version__

CHECKS: dict[str, list[str]] = {
    "check": ["make", "check"],
    "generated": ["make", "generated"],
    "coverage": ["make", "coverage"],
    "conformance 0.31.0": ["make", "conformance", "VLLM=0.31.0"],
    "conformance 0.30.0": ["make", "conformance", "VLLM=0.30.0"],
    "clients": ["make", "clients"],
    "monitoring": ["make", "monitoring"],
    "image": ["make", "image-check"],
    "audit": ["make", "audit"],
    "outage": ["env", "OUTAGE_SECONDS=150", ".venv/bin/python", "-m", "pytest", "tests/platform/test_bad_days.py"],
    **{
        f"simulate {first}": ["make", "simulate", "SCHEDULES=250000", f"FIRST={first}"]
        for first in range(0, 1_000_000, 250_000)
    },
    "batch-kills": ["make", "batch-kills"],
    "cluster-tests": ["make", "cluster-tests"],
    "hostile": ["make", "hostile"],
    "fuzz": ["make", "fuzz"],
    "endurance": ["make", "endurance"],
    "soak": ["make", "soak"],
}
"""Commands by name. `coverage` runs all tests, and so the conformance with the current vLLM."""


def main(chosen: list[str]) -> int:
    """Run the chosen checks, or all of them, and print the table. Return 1 if one fails."""
    rows = [("version", _version_problem() or "ok", 0.0), ("tree", _tree_problem() or "ok", 0.0)]
    for name, command in CHECKS.items():
        if chosen and name.split()[0] not in chosen:
            continue
        sys.stdout.write(f"== {' '.join(command)}\n")
        sys.stdout.flush()
        began = time.monotonic()
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        rows.append((name, f"exit code {code}" if code else "ok", time.monotonic() - began))
    sys.stdout.write(f"\nRelease {__version__}\n")
    for name, result, seconds in rows:
        sys.stdout.write(f"{name:<20} {result:<50} {seconds:8.0f} s\n")
    return int(any(result != "ok" for _, result, _ in rows))


def _version_problem() -> str | None:
    try:
        notes(f"v{__version__}", __version__, (ROOT / "CHANGELOG.md").read_text())
    except ValueError as error:
        return str(error)
    return f"tag v{__version__} exists: raise the version" if f"v{__version__}" in _git("tag").split() else None


def _tree_problem() -> str | None:
    return "there are uncommitted changes" if _git("status", "--porcelain") else None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
