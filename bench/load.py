"""An OpenAI client that sends chat requests to a server and measures when tokens arrive."""

import asyncio
import statistics
import time
from dataclasses import dataclass, field

import aiohttp

from worker.request import sse

GOLDEN_RATIO = 0.618
"""Its multiples, modulo 1, are spread evenly between 0 and 1, however many there are."""


@dataclass(frozen=True, slots=True)
class Load:
    """A number of requests, sent with a fixed concurrency, that generate `tokens` tokens on average.

    Lengths vary from half to one and a half times the average, like those of real responses. With equal lengths all
    requests would end and begin at the same moment, and the model would be idle then.
    """

    concurrency: int
    requests: int
    tokens: int
    stream: bool

    @property
    def mode(self) -> str:
        """How the answers are sent."""
        return "streaming" if self.stream else "not streaming"

    def measure(self, base_url: str) -> dict[str, float]:
        """Send all requests to the server at `base_url` and return the figures, and how many tokens were generated."""
        timings = asyncio.run(run(base_url, self))
        return {**timings.figures(), "tokens": timings.tokens}

    def length(self, number: int) -> int:
        """Return the number of tokens that a request generates. It is the same for every server."""
        return round(self.tokens * (0.5 + number * GOLDEN_RATIO % 1))

    def body(self, number: int) -> dict[str, object]:
        """Return the request's body. Prompts differ, so that the prefix cache does not help."""
        return {
            "model": "tiny",
            "messages": [{"role": "user", "content": f"Tell me a story, number {number}"}],
            "max_tokens": self.length(number),
            "ignore_eos": True,
            "temperature": 0,
            "stream": self.stream,
        }


@dataclass(slots=True)
class Timings:
    """Measured times in seconds. A gap is the time between two arrivals of new text in one stream."""

    seconds: float = 0.0
    tokens: int = 0
    requests: int = 0
    first_token: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Return the rates per second, and the percentiles in milliseconds."""
        return {
            "tokens/s": self.tokens / self.seconds,
            "requests/s": self.requests / self.seconds,
            **_percentiles("TTFT", self.first_token),
            **_percentiles("gap", self.gaps),
        }


def _percentiles(name: str, seconds: list[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return {f"{name} p50 ms": 1000 * second for second in seconds}
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    return {f"{name} p50 ms": 1000 * cuts[9], f"{name} p95 ms": 1000 * cuts[18]}


async def run(base_url: str, load: Load) -> Timings:
    """Send all requests to the server at `base_url` and return the measured times."""
    timings = Timings()
    numbers = iter(range(load.requests))
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:

        async def client() -> None:
            for number in numbers:
                await _request(session, f"{base_url}/chat/completions", number, load, timings)

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(load.concurrency)))
        timings.seconds = time.perf_counter() - started
    return timings


async def _request(session: aiohttp.ClientSession, url: str, number: int, load: Load, timings: Timings) -> None:
    started = time.perf_counter()
    async with session.post(url, json=load.body(number), headers={"Authorization": "Bearer any"}) as response:
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {await response.text()}")
        if load.stream:
            await _read_stream(response.content, started, timings)
        else:
            generated = (await response.json())["usage"]["completion_tokens"]
            if generated != load.length(number):
                raise RuntimeError(f"{generated} tokens instead of {load.length(number)}")
    timings.requests += 1
    timings.tokens += load.length(number)


async def _read_stream(content: aiohttp.StreamReader, started: float, timings: Timings) -> None:
    buffer = sse.EventBuffer()
    last: float | None = None
    done = False
    async for data in content.iter_any():
        events = list(sse.split(buffer.feed(data)))
        done = done or sse.DONE in events
        if events and sse.error_status(events[0]) is not None:
            raise RuntimeError(events[0].decode())
        if not any(b'"content":"' in event and b'"content":""' not in event for event in events):
            continue
        now = time.perf_counter()
        (timings.first_token if last is None else timings.gaps).append(now - (last or started))
        last = now
    if not done:
        raise RuntimeError("a stream ended without [DONE]")
