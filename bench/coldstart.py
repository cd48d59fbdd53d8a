"""`make bench-coldstart`: measures the time from the start of a process to its first token, compared with a reference.

The reference starts as other workers do: it runs `vllm serve` as a child, polls it every two seconds, then imports
runpod. The conditions are empty caches; kept caches; and kept caches with libraries and model dropped from memory.
With `--before FOLDER`, the worker in another checkout is measured too.
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
PAGE = """\
# Cold start

Seconds from the start of the process to the first token of a job that waits in the queue. `make bench-coldstart`,
medians of {pairs} rounds in which the programs took turns, with the embedded model on {cores} cores. The ratio is the
median of each start's ratio to the reference of the same round.

- `reference`: `vllm serve` as a child process, polled every two seconds, and `import runpod` after it, as other workers
  start.{before}
- *empty caches*: vLLM's cache is empty, so it inspects the model's class. *kept caches*: it has been started before, as
  in the image. *cold memory*: in addition the libraries and the model are not in the page cache, as in a container's
  first start. The machine's disk is a fast one.
- Without a GPU there is no compilation, no CUDA graph and no transfer of weights to a GPU: their times, and those of a
  RunPod host, are not measured.

{table}
![The same figures as bars, with the phases](coldstart.svg)
"""


def main(arguments: list[str]) -> int:
    """Measure, then print the table and write the results and the plot to docs/benchmarks."""
    parser = argparse.ArgumentParser(prog="python -m bench.coldstart", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=CONDITIONS)
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="another checkout of the worker to measure")
    options = parser.parse_args(arguments)
    # As in the image.
    subprocess.run(
        [sys.executable, "builder/list_files.py"], cwd=ROOT, env=os.environ | {"PYTHONPATH": "."}, check=True
    )
    workers = {"worker": ROOT} | ({"before": options.before.resolve()} if options.before else {})
    with tempfile.TemporaryDirectory() as kept_cache:
        results = {name: _measure(name, options.pairs, kept_cache, workers) for name in options.conditions}
    summary = {"cores": os.cpu_count(), "pairs": options.pairs, "model": "tiny", "conditions": results}
    out = ROOT / "docs/benchmarks/coldstart"
    out.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n")
    out.with_suffix(".md").write_text(_page(results, options.pairs, options.before))
    _plot(results, out.with_suffix(".svg"))
    sys.stdout.write(_table(results))
    return 0


def _measure(condition: str, pairs: int, kept_cache: str, workers: dict[str, Path]) -> dict[str, Any]:
    """Return the medians of the seconds of the reference and of each of `workers`, a checkout by its name."""
    seconds: dict[str, list[float]] = {name: [] for name in (*workers, "reference")}
    phases: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    if condition != "empty caches":
        # Fill the cache.
        for folder in workers.values():
            _worker(folder, kept_cache)
        _reference(kept_cache)
    for number in range(pairs):
        for name in seconds if number % 2 == 0 else reversed(seconds):
            with tempfile.TemporaryDirectory() as empty_cache:
                cache = empty_cache if condition == "empty caches" else kept_cache
                if condition.endswith("cold memory"):
                    _drop_page_cache()
                if name in workers:
                    taken, of_phases = _worker(workers[name], cache)
                    phases[name].append(of_phases)
                else:
                    taken = _reference(cache)
            seconds[name].append(taken)
            sys.stderr.write(f"{condition}: {name} {taken:.1f} s\n")
    ratios = {
        name: [one / other for one, other in zip(seconds[name], seconds["reference"], strict=True)] for name in workers
    }
    return {
        "seconds": {name: round(statistics.median(times), 2) for name, times in seconds.items()},
        "ratio": {name: round(statistics.median(each), 3) for name, each in ratios.items()},
        "phases": {name: _medians(runs) for name, runs in phases.items()},
    }


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]}


def _worker(folder: Path, cache: str) -> tuple[float, dict[str, float]]:
    """Return the seconds until a job that waits in the queue is completed, and those of each phase of the start."""
    with StandinServer() as server, tempfile.NamedTemporaryFile("w+") as log:
        job = requests.post(f"{server.endpoint_url}/run", json=JOB, timeout=10).json()["id"]
        environ = os.environ | tiny.environment() | worker_environment(server.port) | {"VLLM_CACHE_ROOT": cache}
        began = time.perf_counter()
        with subprocess.Popen([sys.executable, "handler.py"], env=environ, cwd=folder, stderr=log) as process:
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


def _page(results: dict[str, Any], pairs: int, before: Path | None) -> str:
    line = f'\n- `before`: an earlier worker, {_commit(before)} (`BENCH="--before FOLDER"`).' if before else ""
    return PAGE.format(pairs=pairs, cores=os.cpu_count(), before=line, table=_table(results))


def _commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603 - fixed


def _table(results: dict[str, Any]) -> str:
    lines = ["| condition | start | to the first token | ratio | phases, s |", "| --- | --- | --- | --- | --- |"]
    for condition, result in results.items():
        for name, seconds in result["seconds"].items():
            ratio = f"{result['ratio'][name]:.2f}" if name in result["ratio"] else "1"
            values = result["phases"].get(name, {}).items()
            phases = ", ".join(f"{phase} {value:.1f}" for phase, value in values if value >= 0.05)
            lines.append(f"| {condition} | {name} | {seconds:.1f} s | {ratio} | {phases} |")
    return "\n".join(lines) + "\n"


def _plot(results: dict[str, Any], path: Path) -> None:
    bars = [(condition, name) for condition, result in results.items() for name in result["seconds"]]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.4 * len(bars)), layout="constrained")
    colours: dict[str, str] = {}
    for row, (condition, name) in enumerate(bars):
        seconds, left = results[condition]["seconds"][name], 0.0
        axes.barh(row, seconds, color="0.8")
        for phase, value in results[condition]["phases"].get(name, {}).items():
            if phase != "total" and value >= 0.05:
                label = None if phase in colours else phase
                colour = colours.setdefault(phase, f"C{len(colours)}")
                axes.barh(row, value, left=left, color=colour, label=label)
                left += value
        axes.text(seconds, row, f" {seconds:.1f} s", va="center")
    axes.set_yticks(range(len(bars)), [f"{condition}: {name}" for condition, name in bars])
    axes.invert_yaxis()
    axes.set_xlabel("seconds to the first token")
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
