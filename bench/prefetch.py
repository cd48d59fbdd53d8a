"""Measures how much of the time to read 4 GB of weights from disk the prefetch hides behind the import of vLLM."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.tiny import ROOT

FILES = 4
FILE_BYTES = 1 << 30
ROUNDS = 5
IMPORT = [sys.executable, "-c", "import vllm.entrypoints.launchers.api_server.app_state"]


def main() -> int:
    """Measure, and print the result as JSON."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_FOLDER")) as name:
        folder = Path(name)
        for number in range(FILES):
            _write(folder / f"{number}.safetensors")
        seconds: dict[str, list[float]] = {"without": [], "with": []}
        for number in range(ROUNDS):
            for variant in ("without", "with") if number % 2 else ("with", "without"):
                seconds[variant].append(_seconds_to_read(sorted(folder.iterdir()), prefetch=variant == "with"))
    medians = {variant: round(statistics.median(times), 2) for variant, times in seconds.items()}
    hidden = [1 - fast / slow for fast, slow in zip(seconds["with"], seconds["without"], strict=True)]
    result = {"seconds to read after the import": medians, "hidden": round(statistics.median(hidden), 3)}
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


def _write(file: Path) -> None:
    block = os.urandom(1 << 20)
    with file.open("wb") as opened:
        for _ in range(FILE_BYTES >> 20):
            opened.write(block)
        os.fsync(opened.fileno())


def _seconds_to_read(files: list[Path], prefetch: bool) -> float:
    """Return the seconds that reading the files takes after the import of vLLM, with or without the prefetch."""
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, "-m", "worker.model.prefetch", *map(str, files)]
    process = subprocess.Popen(command, cwd=ROOT) if prefetch else None  # noqa: S603 - our own program
    subprocess.run(IMPORT, cwd=ROOT, check=True, capture_output=True)  # noqa: S603 - vLLM
    start = time.perf_counter()
    buffer = bytearray(16 << 20)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    seconds = time.perf_counter() - start
    if process is not None:
        process.wait()
    return seconds


if __name__ == "__main__":
    sys.exit(main())
