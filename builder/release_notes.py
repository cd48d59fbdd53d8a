"""Prints the changelog's section of a release. Usage: builder/release_notes.py vVERSION

The exit code is 1 if the tag is not "v" and the worker's version, or if CHANGELOG.md has no text for that version.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from worker import __version__


def main(tag: str) -> int:
    """Print the section and return the exit code."""
    try:
        section = notes(tag, __version__, (ROOT / "CHANGELOG.md").read_text())
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{section}\n")
    return 0


def notes(tag: str, version: str, changelog: str) -> str:
    """Return the text below the version's heading, up to the next version.

    Raises:
        ValueError: the tag and the version differ, or the changelog has no text for the version.
    """
    if tag != f"v{version}":
        raise ValueError(f"The tag is {tag}, but worker.__version__ is {version}. Use the tag v{version}.")
    section = re.search(rf"^## \[{re.escape(version)}\][^\n]*\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if section is None or not (text := section[1].strip()):
        raise ValueError(f"CHANGELOG.md has no text under '## [{version}]'. Move the text of '## [Unreleased]' there.")
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]) if len(sys.argv) == 2 else "usage: builder/release_notes.py vVERSION")
