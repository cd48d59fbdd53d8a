"""How much of the time to read 4 GB of weights hides behind the import of vLLM; nothing of them is in memory before."""

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
    """Measure and print."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_FOLDER")) as name:
        folder = Path(name)
        for number in range(FILES):
            _write(folder / f"{number}.safetensors")
        seconds: dict[str, list[float]] = {"without": [], "with": []}
        for number in range(ROUNDS):
            for way in ("without", "with") if number % 2 else ("with", "without"):
                seconds[way].append(_reading_after_import(folder, prefetches=way == "with"))
    medians = {way: round(statistics.median(each), 2) for way, each in seconds.items()}
    hidden = [1 - one / other for one, other in zip(seconds["with"], seconds["without"], strict=True)]
    result = {"seconds to read after the import": medians, "hidden": round(statistics.median(hidden), 3)}
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


def _write(file: Path) -> None:
    block = os.urandom(1 << 20)
    with file.open("wb") as opened:
        for _ in range(FILE_BYTES >> 20):
            opened.write(block)
        os.fsync(opened.fileno())


def _reading_after_import(folder: Path, prefetches: bool) -> float:
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, "-m", "worker.model.prefetch", str(folder)]
    prefetch = subprocess.Popen(command, cwd=ROOT) if prefetches else None  # noqa: S603 - our own program
    subprocess.run(IMPORT, cwd=ROOT, check=True, capture_output=True)  # noqa: S603 - vLLM
    began = time.perf_counter()
    buffer = bytearray(16 << 20)
    for file in sorted(folder.iterdir()):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    taken = time.perf_counter() - began
    if prefetch is not None:
        prefetch.wait()
    return taken


if __name__ == "__main__":
    sys.exit(main())
