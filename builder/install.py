"""Installs the packages of a list that the base image lacks: `install.py requirements.txt`.

Packages of the base image keep the versions that vLLM was built and tested with, even if the list has other versions.
"""

import subprocess
import sys
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def main(file: Path) -> int:
    """Install the missing packages. Return 1 if this removed or replaced a package of the base image."""
    before = installed()
    to_install = missing(file.read_text(), before)
    if to_install:
        pip = [sys.executable, "-m", "pip", "install"] if find_spec("pip") else ["uv", "pip", "install", "--system"]
        subprocess.run([*pip, "--no-cache-dir", "--no-deps", *to_install], check=True)
    if changed := replaced(before, installed()):
        sys.stderr.write(f"The installation removed or replaced packages of the base image: {', '.join(changed)}\n")
        return 1
    sys.stdout.write(f"Installed {len(to_install)} packages; the base image's {len(before)} are unchanged\n")
    return 0


def missing(requirements: str, versions: dict[str, str]) -> list[str]:
    """Return the requirements whose package is not in `versions`, in any version."""
    lines = (line.partition("#")[0].strip() for line in requirements.splitlines())
    pins = [Requirement(line) for line in lines if line]
    applicable = (pin for pin in pins if pin.marker is None or pin.marker.evaluate())
    return [f"{pin.name}{pin.specifier}" for pin in applicable if canonicalize_name(pin.name) not in versions]


def replaced(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Describe each package that was removed or has another version now."""
    return [f"{name} {version} → {after.get(name)}" for name, version in before.items() if after.get(name) != version]


def installed() -> dict[str, str]:
    """Return the version of every installed package."""
    return {canonicalize_name(package.name): package.version for package in distributions() if package.name}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
