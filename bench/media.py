"""What the guard at vLLM's media connector costs: eight photographs and a film, with the guard and without.

No model runs. Every load is repeated in turn with the worker's connector and vLLM's own; figures are medians. "Beyond
the slowest fetch" is the time from the first fetch's start to the last image's pixels, less the slowest fetch: what
checking and decoding cost that did not happen while something else was still on its way.
"""

import asyncio
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import requests
from PIL import Image
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.video_decoders.opencv import OpenCVVideoBackendMixin

from tests.support import media
from tests.support.ports import free_port
from tests.support.tiny import ROOT
from worker.engine import connector as guarding
from worker.settings import settings as config
from worker.telemetry.usage import Meter, metered

ROUNDS = 15
PHOTOGRAPHS = 8

Load = Callable[[], Awaitable[Any]]


def main() -> int:
    """Measure, print, and write the figures."""
    with tempfile.TemporaryDirectory() as folder, _server(Path(folder)) as url:
        figures = asyncio.run(_measure(Path(folder), url))
    result = {"command": "python -m bench.media", "cores": os.cpu_count(), "rounds": ROUNDS, "figures": figures}
    text = json.dumps(result, indent=1) + "\n"
    (ROOT / "docs/benchmarks/media.json").write_text(text)
    sys.stdout.write(text)
    return 0


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    """Serve photographs of a megabyte each, and a film, from a process of its own."""
    for index in range(PHOTOGRAPHS):
        (folder / f"{index}.jpg").write_bytes(_photograph(index))
    (folder / "film.mp4").write_bytes(media.film("red", "blue", frames=240, size=(1280, 720), rate=24.0))
    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)]
    with subprocess.Popen(  # noqa: S603 - its own program
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        url = f"http://127.0.0.1:{port}"
        while True:
            try:
                requests.get(url, timeout=5)
                break
            except requests.ConnectionError:
                time.sleep(0.05)
        yield url
        server.terminate()


def _photograph(seed: int) -> bytes:
    """Return a JPEG file of a megabyte: smooth, with some grain."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(
        (1600, 1200), Image.Resampling.BICUBIC
    )
    grain = rng.normal(0, 14, (1200, 1600, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
    return file.getvalue()


async def _measure(folder: Path, url: str) -> dict[str, Any]:
    in_process = OpenCVVideoBackendMixin.open_video_capture
    guard = guarding.guard(config.load({"MEDIA_ALLOW_PRIVATE_NETWORKS": "true"}), None)
    guarding.install(guard)
    in_a_process_of_its_own = OpenCVVideoBackendMixin.open_video_capture
    connectors = {"worker": MEDIA_CONNECTOR_REGISTRY.load(guarding.NAME), "vLLM": MediaConnector()}
    links = [f"{url}/{index}.jpg" for index in range(PHOTOGRAPHS)]
    inline = [media.data_url((folder / f"{index}.jpg").read_bytes(), "image/jpeg") for index in range(PHOTOGRAPHS)]
    film = media.data_url((folder / "film.mp4").read_bytes(), "video/mp4")
    seconds: dict[str, list[float]] = {}

    async def timed(name: str, load: Load) -> float:
        began = time.perf_counter()
        await load()
        seconds.setdefault(name, []).append(time.perf_counter() - began)
        return seconds[name][-1]

    for number in range(ROUNDS + 1):
        for name, connector in connectors.items() if number % 2 else reversed(connectors.items()):
            for what, urls in (("links", links), ("base64", inline)):
                meter = Meter()
                metered.set(meter)
                total = await timed(f"{what}, {name}", partial(_images, connector, urls))
                if meter.fetches:
                    slowest = max(fetch.seconds for fetch in meter.fetches)
                    seconds.setdefault("links, beyond the slowest fetch", []).append(total - slowest)
            opening = in_a_process_of_its_own if name == "worker" else in_process
            setattr(OpenCVVideoBackendMixin, "open_video_capture", opening)  # noqa: B010 - to mypy
            await timed(f"film, {name}", partial(connector.fetch_video_async, film))
        if number == 0:
            # The first round has started processes and connections.
            seconds.clear()
    await guard.aclose()
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    ratios = {
        f"{what}, worker to vLLM": round(
            statistics.median(
                one / other for one, other in zip(seconds[f"{what}, worker"], seconds[f"{what}, vLLM"], strict=True)
            ),
            3,
        )
        for what in ("links", "base64", "film")
    }
    return {"ms": {name: round(1000 * value, 1) for name, value in sorted(medians.items())}, "ratio": ratios}


async def _images(connector: MediaConnector, urls: list[str]) -> None:
    await asyncio.gather(*(connector.fetch_image_async(url) for url in urls))


if __name__ == "__main__":
    sys.exit(main())
