"""Load an endpoint with chats and tell how soon tokens come, and how many.

    RUNPOD_API_KEY=… python examples/load_test.py --endpoint ENDPOINT_ID --concurrency 16 --duration 60
    API_KEY=… python examples/load_test.py --base-url http://127.0.0.1:8000/v1 --rate 5 --plot load.svg

With --concurrency, so many requests run at any time; with --rate, so many begin every second, however many run
already, as when people come by themselves. Every request streams. The exit code is 1 when any failed.
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
class Seen:
    """What the client saw. Times are in seconds; `finished` counts from the beginning."""

    first_token: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    finished: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)


def main() -> int:
    """Run the load and print the figures; return the exit code."""
    options = parse_arguments()
    try:
        seen = asyncio.run(load(options))
    except (ValueError, openai.OpenAIError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(report(seen))
    for text, count in seen.errors.most_common():
        print(f"{count} times: {text}", file=sys.stderr)
    if options.plot and seen.total:
        plot(seen, options.plot)
    return 1 if seen.errors or not seen.total else 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--concurrency", type=int, default=8, help="requests at any time (default: %(default)s)")
    how.add_argument("--rate", type=float, help="requests that begin every second, at random moments")
    parser.add_argument("--duration", type=float, default=30, help="seconds in which requests begin (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--prompt", default="Tell me a story", help="each request adds its number")
    parser.add_argument("--image", help="the URL of an image that each request holds")
    parser.add_argument("--model", help="the model's name, by default the first one that is served")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the times")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--endpoint", metavar="ENDPOINT_ID", help="a RunPod endpoint; its key is RUNPOD_API_KEY")
    where.add_argument("--base-url", help="another server's address, with /v1; its key is API_KEY")
    options = parser.parse_args()
    if options.concurrency < 1 or options.duration <= 0 or (options.rate is not None and options.rate <= 0):
        parser.error("--concurrency, --rate and --duration must be more than 0")
    return options


def connect(options: argparse.Namespace) -> openai.AsyncOpenAI:
    """Return a client that tries nothing again: what fails shall be seen."""
    if options.endpoint:
        base_url, key = f"https://api.runpod.ai/v2/{options.endpoint}/openai/v1", os.environ.get("RUNPOD_API_KEY", "")
        if not key:
            raise ValueError("RUNPOD_API_KEY is not set")
    else:
        base_url, key = options.base_url, os.environ.get("API_KEY", "none")
    return openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=600)


async def load(options: argparse.Namespace) -> Seen:
    """Send the requests and wait for the last of them."""
    seen = Seen()
    async with connect(options) as client:
        model = options.model or (await anext(aiter(client.models.list()))).id
        began = time.monotonic()
        end = began + options.duration
        number = 0

        async def request() -> None:
            nonlocal number
            number += 1
            try:
                await ask(client, body(options, model, number), seen)
                seen.finished.append(time.monotonic() - began)
            except openai.OpenAIError as error:
                seen.errors[str(error)[:200]] += 1

        async def one_after_the_other() -> None:
            while time.monotonic() < end:
                await request()

        if options.rate is None:
            await asyncio.gather(*(one_after_the_other() for _ in range(options.concurrency)))
        else:
            async with asyncio.TaskGroup() as tasks:
                while time.monotonic() < end:
                    tasks.create_task(request())
                    await asyncio.sleep(random.expovariate(options.rate))
        seen.seconds = time.monotonic() - began
    return seen


def body(options: argparse.Namespace, model: str, number: int) -> dict[str, Any]:
    """Return a request; prompts differ so that no answer can be had from another's."""
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


async def ask(client: openai.AsyncOpenAI, fields: dict[str, Any], seen: Seen) -> None:
    """Read one answer to its end."""
    began = time.monotonic()
    first: float | None = None
    async for chunk in await client.chat.completions.create(**fields):
        if first is None and chunk.choices and chunk.choices[0].delta.content:
            first = time.monotonic() - began
        if chunk.usage:
            seen.tokens += chunk.usage.completion_tokens
    seen.total.append(time.monotonic() - began)
    if first is not None:
        seen.first_token.append(first)


def report(seen: Seen) -> str:
    """Return the figures as a table."""
    lines = [
        f"{len(seen.total)} answers and {sum(seen.errors.values())} errors in {seen.seconds:.1f} s",
        f"{len(seen.total) / seen.seconds:.2f} requests/s, {seen.tokens / seen.seconds:.1f} tokens/s",
        f"{'seconds':<20}{'p50':>10}{'p90':>10}{'p95':>10}{'p99':>10}{'max':>10}",
    ]
    for title, seconds in (("first token", seen.first_token), ("total", seen.total)):
        if seconds:
            values = [*(percentile(seconds, cut) for cut in (50, 90, 95, 99)), max(seconds)]
            lines.append(f"{title:<20}" + "".join(f"{value:>10.3f}" for value in values))
    return "\n".join(lines)


def percentile(seconds: list[float], cut: int) -> float:
    """Return what so many per cent of the times are not above."""
    return statistics.quantiles(seconds, n=100, method="inclusive")[cut - 1] if len(seconds) > 1 else seconds[0]


def plot(seen: Seen, path: Path) -> None:
    """Draw how many requests took how long, and when answers were finished."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("There is no plot: pip install matplotlib", file=sys.stderr)
        return
    mpl.use("svg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for title, seconds in (("first token", seen.first_token), ("total", seen.total)):
        left.plot(sorted(seconds), [100 * (index + 1) / len(seconds) for index in range(len(seconds))], label=title)
    left.set(xscale="log", xlabel="seconds", ylabel="per cent of the requests", title="Times")
    left.grid(visible=True, which="both", alpha=0.3)
    left.legend()
    right.hist(seen.finished, bins=min(30, max(1, int(seen.seconds))))
    right.set(xlabel="seconds since the beginning", ylabel="answers", title="Finished")
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
