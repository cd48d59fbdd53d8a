"""`make fuzz`: fuzzing guided by coverage. Failing inputs are added to tests/fuzz/corpus, which the test suite runs."""

import sys
from pathlib import Path

import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

with atheris.instrument_imports(include=["worker"]):
    from tests.fuzz import targets

CORPUS = Path(__file__).with_name("corpus")


def run_targets(data: bytes) -> None:
    """Run each target on some bytes."""
    targets.job_text(data)
    if data:
        targets.stream(data[1:], 1 + data[0] % 16)


if __name__ == "__main__":
    working_corpus = Path(sys.argv[1])
    working_corpus.mkdir(exist_ok=True)
    options = [*sys.argv[2:], f"-artifact_prefix={CORPUS}/found-", str(working_corpus), str(CORPUS)]
    atheris.Setup([sys.argv[0], *options], run_targets)
    atheris.Fuzz()
