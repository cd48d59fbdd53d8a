"""`make fuzz`: fuzzing guided by coverage. Failing inputs are added to tests/fuzz/corpus, which the test suite runs."""

import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

# Pillow parses headers in Python. It imports its plugins when they are first needed, or here.
with atheris.instrument_imports(include=["worker", "PIL"]):
    from PIL import Image

    Image.init()
    from tests.fuzz import files, media, targets

CORPUS = Path(__file__).with_name("corpus")


def write_seeds(folder: Path) -> None:
    """Write the whole files into a folder."""
    for name, data in {**files.images(), **files.claims(), **files.films()}.items():
        (folder / name).write_bytes(data)
    for name, data in files.sounds().items():
        (folder / f"sound-{name}").write_bytes(data)


def mutated(data: bytes, max_size: int, _seed: int) -> bytes:
    """Return libFuzzer's mutation, with correct checksums if it is a PNG file."""
    changed = bytes(atheris.Mutate(data, max_size))
    return files.with_checksums(changed) if changed.startswith(files.PNG) else changed


if __name__ == "__main__":
    working_corpus = Path(sys.argv[1])
    working_corpus.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as seeds, media.Decoding() as decoding:
        write_seeds(Path(seeds))
        options = [*sys.argv[2:], f"-artifact_prefix={CORPUS}/found-", str(working_corpus), str(CORPUS), seeds]
        arguments = [sys.argv[0], *options]
        atheris.Setup(arguments, lambda data: targets.everything(data, decoding), custom_mutator=mutated)
        atheris.Fuzz()
