"""`make fuzz`: fuzzing guided by coverage. What is found goes into tests/fuzz/corpus, which the test suite replays."""

import sys
from pathlib import Path

import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

with atheris.instrument_imports(include=["worker"]):
    from tests.fuzz import targets

CORPUS = Path(__file__).with_name("corpus")


def one(data: bytes) -> None:
    """Run each target on some bytes."""
    targets.job_text(data)
    if data:
        targets.stream(data[1:], 1 + data[0] % 16)


if __name__ == "__main__":
    found = Path(sys.argv[1])
    found.mkdir(exist_ok=True)
    atheris.Setup([sys.argv[0], *sys.argv[2:], f"-artifact_prefix={CORPUS}/found-", str(found), str(CORPUS)], one)
    atheris.Fuzz()
