"""Send chat requests to an endpoint and measure the time to the first token and the tokens per second.

    RUNPOD_API_KEY=… python examples/load_test.py --endpoint ENDPOINT_ID --concurrency 16 --duration 60
    API_KEY=… python examples/load_test.py --base-url http://127.0.0.1:8000/v1 --rate 5 --plot load.svg

With --concurrency, the number of running requests is constant. With --rate, requests begin at random moments, so many a
second on average, like those of independent users. All requests stream. The exit code is 1 if a request failed.
Needs: pip install openai, and matplotlib for --plot
"""

import argparse
import asyncio
import os
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai


@dataclass
class Measurements:
    """Times are in seconds. Those in `finished` are counted from the start of the test."""

    first_token: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    finished: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)


def main() -> int:
    """Run the test, print the figures and return the exit code."""
    options = parse_arguments()
    try:
        measured = asyncio.run(load(options))
    except (ValueError, openai.OpenAIError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(report(measured))
    for text, count in measured.errors.most_common():
        print(f"{count} times: {text}", file=sys.stderr)
    if options.plot and measured.total:
        plot(measured, options.plot)
    return 1 if measured.errors or not measured.total else 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    load_type = parser.add_mutually_exclusive_group()
    load_type.add_argument("--concurrency", type=int, default=8, help="running requests (default: %(default)s)")
    load_type.add_argument("--rate", type=float, help="requests per second, on average")
    parser.add_argument("--duration", type=float, default=30, help="seconds during which requests begin (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--prompt", default="Tell me a story", help="each request appends its number")
    parser.add_argument("--image", help="the URL of an image that each request contains")
    parser.add_argument("--model", help="the model's name (default: the first model of the server)")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="plot the times")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--endpoint", metavar="ENDPOINT_ID", help="a RunPod endpoint; set its key in RUNPOD_API_KEY")
    target.add_argument("--base-url", help="another server's URL, with /v1; set its key in API_KEY")
    options = parser.parse_args()
    if options.concurrency < 1 or options.duration <= 0 or (options.rate is not None and options.rate <= 0):
        parser.error("--concurrency, --rate and --duration must be more than 0")
    return options


def connect(options: argparse.Namespace) -> openai.AsyncOpenAI:
    """Return a client without retries, so that every failure counts."""
    if options.endpoint:
        base_url, key = f"https://api.runpod.ai/v2/{options.endpoint}/openai/v1", os.environ.get("RUNPOD_API_KEY", "")
        if not key:
            raise ValueError("RUNPOD_API_KEY is not set")
    else:
        base_url, key = options.base_url, os.environ.get("API_KEY", "none")
    return openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=600)


async def load(options: argparse.Namespace) -> Measurements:
    """Send the requests and wait until all have ended."""
    measured = Measurements()
    async with connect(options) as client:
        model = options.model or (await anext(aiter(client.models.list()))).id
        began = time.monotonic()
        end = began + options.duration
        number = 0

        async def request() -> None:
            nonlocal number
            number += 1
            try:
                await ask(client, body(options, model, number), measured)
                measured.finished.append(time.monotonic() - began)
            except openai.OpenAIError as error:
                measured.errors[str(error)[:200]] += 1

        async def client_loop() -> None:
            while time.monotonic() < end:
                await request()

        if options.rate is None:
            await asyncio.gather(*(client_loop() for _ in range(options.concurrency)))
        else:
            async with asyncio.TaskGroup() as tasks:
                while time.monotonic() < end:
                    tasks.create_task(request())
                    await asyncio.sleep(random.expovariate(options.rate))
        measured.seconds = time.monotonic() - began
    return measured


def body(options: argparse.Namespace, model: str, number: int) -> dict[str, Any]:
    """Return a request. Prompts differ, so that the prefix cache does not help."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": f"{options.prompt}, number {number}"}]
    if options.image:
        parts.insert(0, {"type": "image_url", "image_url": {"url": options.image}})
    return {
        "model": model,
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": options.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def ask(client: openai.AsyncOpenAI, fields: dict[str, Any], measured: Measurements) -> None:
    """Send one request, read its stream to the end and record the times."""
    began = time.monotonic()
    first: float | None = None
    async for chunk in await client.chat.completions.create(**fields):
        if first is None and chunk.choices and chunk.choices[0].delta.content:
            first = time.monotonic() - began
        if chunk.usage:
            measured.tokens += chunk.usage.completion_tokens
    measured.total.append(time.monotonic() - began)
    if first is not None:
        measured.first_token.append(first)


def report(measured: Measurements) -> str:
    """Return the figures as a table."""
    lines = [
        f"{len(measured.total)} answers and {sum(measured.errors.values())} errors in {measured.seconds:.1f} s",
        f"{len(measured.total) / measured.seconds:.2f} requests/s, {measured.tokens / measured.seconds:.1f} tokens/s",
        f"{'seconds':<20}{'p50':>10}{'p90':>10}{'p95':>10}{'p99':>10}{'max':>10}",
    ]
    for title, seconds in (("first token", measured.first_token), ("total", measured.total)):
        if seconds:
            values = [*(percentile(seconds, cut) for cut in (50, 90, 95, 99)), max(seconds)]
            lines.append(f"{title:<20}" + "".join(f"{value:>10.3f}" for value in values))
    return "\n".join(lines)


def percentile(seconds: list[float], cut: int) -> float:
    """Return a percentile of the times; `cut` is between 1 and 99."""
    return statistics.quantiles(seconds, n=100, method="inclusive")[cut - 1] if len(seconds) > 1 else seconds[0]


def plot(measured: Measurements, path: Path) -> None:
    """Plot the distribution of the times, and the number of answers finished over time."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("no plot: matplotlib is missing (pip install matplotlib)", file=sys.stderr)
        return
    mpl.use("svg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for title, seconds in (("first token", measured.first_token), ("total", measured.total)):
        left.plot(sorted(seconds), [100 * (index + 1) / len(seconds) for index in range(len(seconds))], label=title)
    left.set(xscale="log", xlabel="seconds", ylabel="% of the requests", title="Times")
    left.grid(visible=True, which="both", alpha=0.3)
    left.legend()
    right.hist(measured.finished, bins=min(30, max(1, int(measured.seconds))))
    right.set(xlabel="seconds since the start", ylabel="answers", title="Finished answers")
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
