"""Installs what a base image lacks of a list of pinned packages, and replaces nothing: `install.py requirements.txt`.

What vLLM's own image holds stays in the version that vLLM was built and tested with, whatever the list says.
"""

import subprocess
import sys
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def main(file: Path) -> int:
    """Install; fail when a package that was there is gone or another."""
    before = installed()
    lacking = missing(file.read_text(), before)
    if lacking:
        pip = [sys.executable, "-m", "pip", "install"] if find_spec("pip") else ["uv", "pip", "install", "--system"]
        subprocess.run([*pip, "--no-cache-dir", "--no-deps", *lacking], check=True)
    if changed := replaced(before, installed()):
        sys.stderr.write(f"Packages of the base image were replaced: {', '.join(changed)}\n")
        return 1
    sys.stdout.write(f"Installed {len(lacking)} packages; {len(before)} of the base image are as they were\n")
    return 0


def missing(requirements: str, there: dict[str, str]) -> list[str]:
    """Return the pinned packages of a list that are not there in any version."""
    lines = (line.partition("#")[0].strip() for line in requirements.splitlines())
    wanted = [Requirement(line) for line in lines if line]
    applying = (one for one in wanted if one.marker is None or one.marker.evaluate())
    return [f"{one.name}{one.specifier}" for one in applying if canonicalize_name(one.name) not in there]


def replaced(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Return what is gone or has another version, in words."""
    return [f"{name} {version} → {after.get(name)}" for name, version in before.items() if after.get(name) != version]


def installed() -> dict[str, str]:
    """Return every package that is there, with its version."""
    return {canonicalize_name(one.name): one.version for one in distributions() if one.name}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
