"""`make bench-batch`: compares batches with `vllm run-batch`, and measures what they cost the callers beside them.

Both programs load an engine once, then take turns with the same files: short questions, photographs in base64, and
photographs behind links that a store answers after 0.3 s. A file's time is that of its lines, from the opening of the
input to the complete output.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil

from bench import batch_beside
from bench.batch_programs import MARK
from bench.media import PHOTOGRAPHS, photograph
from bench.servers import vllm_flags
from tests.support import tiny
from tests.support.local_server import LocalServer
from tests.support.media import data_url
from tests.support.tiny import ROOT

TOKENS = 32
"""The tokens of each answer."""
STORE_SECONDS = 0.3
ENVIRONMENT = {
    "vllm": {"VLLM_LOGGING_LEVEL": "ERROR"},
    "worker": {"VLLM_LOGGING_LEVEL": "ERROR", "LOG_LEVEL": "WARNING", "MEDIA_ALLOW_PRIVATE_NETWORKS": "true"},
}


def line(number: int, content: object) -> dict[str, Any]:
    """Return a line of a batch."""
    messages = [{"role": "user", "content": content}]
    body = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
    return {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def texts(count: int) -> Iterator[dict[str, Any]]:
    """Yield lines with different questions."""
    return (line(number, f"Question {number}: what comes after {number * 7919}?") for number in range(count))


def pictures(urls: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield lines about photographs."""
    for number, url in enumerate(urls):
        image = {"type": "image_url", "image_url": {"url": url}}
        yield line(number, [image, {"type": "text", "text": "What is this?"}])


class Store(LocalServer):
    """Serves photographs of 0.7 MB, each after some time, as a store far away does."""

    def __init__(self) -> None:
        files = [photograph(seed) for seed in range(PHOTOGRAPHS)]
        self.inline = [data_url(file, "image/jpeg") for file in files]

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                time.sleep(STORE_SECONDS)
                file = files[int(self.path.rpartition("?")[2]) % PHOTOGRAPHS]
                self.send_response(200)
                self.send_header("Content-Type", "image/jpeg")
                self.send_header("Content-Length", str(len(file)))
                self.end_headers()
                self.wfile.write(file)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(Handler)

    def links(self, count: int) -> Iterator[str]:
        """Yield links that differ."""
        return (f"{self.url}/photograph?{number}" for number in range(count))


class Program:
    """A program that answers batches."""

    def __init__(self, name: str, process: "subprocess.Popen[str]") -> None:
        self.name = name
        self._process = process
        self._read()

    def seconds(self, source: Path, output: Path) -> float:
        """Let it answer a file, check the output, and return how long it took."""
        assert self._process.stdin
        self._process.stdin.write(f"{source} {output}\n")
        self._process.stdin.flush()
        seconds = float(self._read())
        lines = source.read_text().splitlines()
        bodies = [json.loads(text)["response"]["body"] for text in output.read_text().splitlines()]
        if [body["usage"]["completion_tokens"] for body in bodies] != [TOKENS] * len(lines):
            raise RuntimeError(f"{self.name} did not answer all lines of {source.name}")
        return seconds

    def memory_mb(self) -> float:
        """Return the memory of the process and its children, without those that run the model."""
        processes = [psutil.Process(self._process.pid)]
        processes += [each for each in processes[0].children(recursive=True) if "VLLM" not in " ".join(each.cmdline())]
        return sum(process.memory_full_info().pss for process in processes) / 1e6

    def _read(self) -> str:
        assert self._process.stdout
        for text in self._process.stdout:
            if text.startswith(MARK):
                return text.removeprefix(MARK)
        raise RuntimeError(f"{self.name} has ended")


@contextmanager
def program(name: str, log: Path) -> Iterator[Program]:
    """Start one of the programs of `bench.batch_programs`."""
    environ = tiny.environment()
    arguments = vllm_flags(environ) if name == "vllm" else []
    command = [sys.executable, "-m", "bench.batch_programs", name, *arguments]
    pipe = subprocess.PIPE
    with log.open("wb") as errors:
        process = subprocess.Popen(  # noqa: S603 - the command is fixed
            command,
            cwd=ROOT,
            env={**os.environ, **environ, **ENVIRONMENT[name]},
            stdin=pipe,
            stdout=pipe,
            stderr=errors,
            text=True,
        )
        try:
            yield Program(name, process)
        except RuntimeError:
            sys.stderr.write(log.read_text()[-3000:])
            raise
        finally:
            process.communicate(timeout=60)


def compare(lines: Mapping[str, Iterable[Any]], rounds: int, folder: Path) -> dict[str, Any]:
    """Let both programs answer each file in turn. Return the median seconds, and the median ratio of the speeds."""
    seconds: dict[tuple[str, str], list[float]] = {}
    with ExitStack() as stack:
        for name, items in lines.items():
            (folder / name).write_text("".join(f"{json.dumps(item)}\n" for item in items))
        programs = [stack.enter_context(program(name, folder / f"{name}.log")) for name in ("vllm", "worker")]
        # The first round also starts processes and compiles.
        for number in range(rounds + 1):
            for name in lines:
                for each in programs if number % 2 else reversed(programs):
                    taken = each.seconds(folder / name, folder / f"{each.name}-{name}-{number}")
                    sys.stderr.write(f"round {number}, {name}, {each.name}: {taken:.2f} s, {each.memory_mb():.0f} MB\n")
                    if number:
                        seconds.setdefault((name, each.name), []).append(taken)
    result = {}
    for name in lines:
        vllm, worker = seconds[name, "vllm"], seconds[name, "worker"]
        ratios = [theirs / ours for theirs, ours in zip(vllm, worker, strict=True)]
        result[name] = {
            "vllm run-batch, s": round(statistics.median(vllm), 2),
            "worker, s": round(statistics.median(worker), 2),
            "speed, worker to vllm": round(statistics.median(ratios), 3),
            "all": [round(ratio, 3) for ratio in ratios],
        }
    return result


def main(arguments: list[str]) -> int:
    """Measure, then print the figures and write them to docs/benchmarks/batch.json."""
    parser = argparse.ArgumentParser(prog="python -m bench.batch", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--pictures", type=int, default=400)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Store() as store:
            lines = {
                "texts": texts(options.texts),
                "photographs": pictures(islice(cycle(store.inline), options.pictures)),
                "links": pictures(store.links(options.pictures)),
            }
            throughput = compare(lines, options.rounds, folder)
        beside = batch_beside.measure(options.rounds, texts(batch_beside.LINES), folder)
    command = " ".join(["python -m bench.batch", *arguments])
    result = {"command": command, "cores": os.cpu_count(), "rounds": options.rounds}
    text = json.dumps({**result, "lines": vars(options), "throughput": throughput, "beside": beside}, indent=1) + "\n"
    (ROOT / "docs/benchmarks/batch.json").write_text(text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
