"""`make bench-coldstart`: measures the time from the start of a process to its first token, compared with a reference.

The reference starts as other workers do: it runs `vllm serve` as a child, polls it every two seconds, then imports
runpod. The conditions are empty caches; kept caches; and kept caches with libraries and model dropped from memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import requests

from bench.servers import vllm_flags
from standin import StandinServer, worker_environment
from tests.support import tiny
from tests.support.ports import free_port
from tests.support.tiny import MODEL, ROOT

mpl.use("svg")
from matplotlib import pyplot as plt

CONDITIONS = ("empty caches", "kept caches", "kept caches, cold memory")
JOB = {"input": {"prompt": "Hello", "max_tokens": 1}}
REFERENCE = """
import subprocess, sys, time, urllib.request
port, *flags = sys.argv[1:]
command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", port, *flags]
with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
    base = f"http://127.0.0.1:{port}"
    while True:
        try:
            urllib.request.urlopen(f"{base}/health")
            break
        except OSError:
            time.sleep(2)
    import runpod
    import requests
    response = requests.post(f"{base}/v1/completions", json={"model": "tiny", "prompt": "Hello", "max_tokens": 1})
    response.raise_for_status()
    print("token", flush=True)
    server.terminate()
"""


def main(arguments: list[str]) -> int:
    """Measure, then print the table and write the results and the plot to docs/benchmarks."""
    parser = argparse.ArgumentParser(prog="python -m bench.coldstart", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=CONDITIONS)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as kept_cache:
        results = {condition: _measure(condition, options.pairs, kept_cache) for condition in options.conditions}
    summary = {"cores": os.cpu_count(), "pairs": options.pairs, "model": "tiny", "conditions": results}
    out = ROOT / "docs/benchmarks/coldstart"
    out.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n")
    out.with_suffix(".md").write_text(_table(results))
    _plot(results, out.with_suffix(".svg"))
    sys.stdout.write(_table(results))
    return 0


def _measure(condition: str, pairs: int, kept_cache: str) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"worker": [], "reference": []}
    phases: list[dict[str, float]] = []
    if condition != "empty caches":
        # Fill the cache.
        _worker(kept_cache)
        _reference(kept_cache)
    for number in range(pairs):
        for name in ("worker", "reference") if number % 2 == 0 else ("reference", "worker"):
            with tempfile.TemporaryDirectory() as empty_cache:
                cache = empty_cache if condition == "empty caches" else kept_cache
                if condition.endswith("cold memory"):
                    _drop_page_cache()
                taken, worker_phases = _worker(cache) if name == "worker" else (_reference(cache), {})
            seconds[name].append(taken)
            phases += [worker_phases] if worker_phases else []
            sys.stderr.write(f"{condition}: {name} {taken:.1f} s\n")
    medians = {name: round(statistics.median(times), 2) for name, times in seconds.items()}
    ratios = [worker / reference for worker, reference in zip(seconds["worker"], seconds["reference"], strict=True)]
    return {
        "seconds": medians,
        "ratio": round(statistics.median(ratios), 3),
        "phases": {name: round(statistics.median(run[name] for run in phases), 2) for name in phases[0]},
    }


def _worker(cache: str) -> tuple[float, dict[str, float]]:
    """Return the seconds until a job that waits in the queue is completed, and those of each phase of the start."""
    with StandinServer() as server, tempfile.NamedTemporaryFile("w+") as log:
        job = requests.post(f"{server.endpoint_url}/run", json=JOB, timeout=10).json()["id"]
        environ = os.environ | tiny.environment() | worker_environment(server.port) | {"VLLM_CACHE_ROOT": cache}
        began = time.perf_counter()
        with subprocess.Popen([sys.executable, "handler.py"], env=environ, cwd=ROOT, stderr=log) as process:
            server.wait_until(lambda platform: platform.jobs[job].status == "COMPLETED", timeout=300)
            taken = time.perf_counter() - began
            process.terminate()
        log.seek(0)
        return taken, dict(_phases(log))


def _phases(log: Any) -> Iterator[tuple[str, float]]:
    for line in log:
        if line.startswith("{") and "phase" in (record := json.loads(line)):
            yield record["phase"], record["seconds"]


def _reference(cache: str) -> float:
    """Return the seconds until the reference has generated a token."""
    environ = tiny.environment()
    command = [sys.executable, "-c", REFERENCE, str(free_port()), *vllm_flags(environ)]
    began = time.perf_counter()
    with subprocess.Popen(  # noqa: S603 - the command is fixed
        command, env=os.environ | environ | {"VLLM_CACHE_ROOT": cache}, cwd=ROOT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        taken = time.perf_counter() - began
    if line != b"token\n":
        raise RuntimeError(f"The reference ended with exit code {process.returncode} before it generated a token.")
    return taken


def _drop_page_cache() -> None:
    """Drop libraries, bytecode and the model from the page cache."""
    for folder in (Path(sysconfig.get_path("purelib")), MODEL):
        for file in folder.rglob("*"):
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def _table(results: dict[str, Any]) -> str:
    lines = ["| condition | worker | reference | ratio | phases of the worker, s |", "| --- | --- | --- | --- | --- |"]
    for condition, result in results.items():
        seconds = result["seconds"]
        phases = ", ".join(f"{name} {value:.1f}" for name, value in result["phases"].items() if value >= 0.05)
        times = f"{seconds['worker']:.1f} s | {seconds['reference']:.1f} s"
        lines.append(f"| {condition} | {times} | {result['ratio']:.2f} | {phases} |")
    return "\n".join(lines) + "\n"


def _plot(results: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 1 + len(results)))
    for row, (condition, result) in enumerate(results.items()):
        left = 0.0
        for index, (name, value) in enumerate((k, v) for k, v in result["phases"].items() if k != "total"):
            axes.barh(row + 0.2, value, 0.35, left=left, color=f"C{index}", label=name if row == 0 else None)
            left += value
        axes.barh(row - 0.2, result["seconds"]["reference"], 0.35, color="0.7", label="reference" if row == 0 else None)
        axes.text(result["seconds"]["reference"], row - 0.2, f" {condition}", va="center")
    axes.set_yticks([])
    axes.set_xlabel("seconds to the first token")
    axes.legend(loc="lower right", fontsize="small")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
