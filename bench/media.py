"""Measures how long the worker's media connector takes, compared with vLLM's own: photographs and a video.

No model runs. The two connectors take turns, and the figures are medians. "Beyond the slowest fetch" is the time from
the start of the first fetch until all images are decoded, minus the slowest fetch: the time for checks and decoding
that did not overlap with fetches.
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
from worker import settings
from worker.engine import patches
from worker.engine.connector import Guard
from worker.memory import Budget, container_memory, current_account
from worker.settings.environment import MEDIA_CONNECTOR
from worker.telemetry.usage import Usage, current_usage

ROUNDS = 15
PHOTOGRAPHS = 8

Load = Callable[[], Awaitable[Any]]


def main() -> int:
    """Measure, then print the figures and write them to docs/benchmarks/media.json."""
    with tempfile.TemporaryDirectory() as folder, _server(Path(folder)) as url:
        figures = asyncio.run(_measure(Path(folder), url))
    result = {"command": "python -m bench.media", "cores": os.cpu_count(), "rounds": ROUNDS, "figures": figures}
    text = json.dumps(result, indent=1) + "\n"
    (ROOT / "docs/benchmarks/media.json").write_text(text)
    sys.stdout.write(text)
    return 0


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    """Serve photographs of about 1 MB each, and a video, from a separate process."""
    for index in range(PHOTOGRAPHS):
        (folder / f"{index}.jpg").write_bytes(photograph(index))
    (folder / "film.mp4").write_bytes(media.film("red", "blue", frames=240, size=(1280, 720), rate=24.0))
    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)]
    with subprocess.Popen(  # noqa: S603 - the command is fixed
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        url = f"http://127.0.0.1:{port}"
        while True:
            try:
                requests.get(url, timeout=5)
                break
            except requests.ConnectionError:
                time.sleep(0.05)
        try:
            yield url
        finally:
            server.terminate()


def photograph(seed: int, size: tuple[int, int] = (1600, 1200)) -> bytes:
    """Return a JPEG file, of about 0.7 MB in the default size: a smooth image with some grain."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = rng.normal(0, 14, (size[1], size[0], 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
    return file.getvalue()


async def _measure(folder: Path, url: str) -> dict[str, Any]:
    open_video = {"vLLM": OpenCVVideoBackendMixin.open_video_capture}
    memory = Budget(container_memory() // 4)
    guard = Guard(settings.read({"MEDIA_ALLOW_PRIVATE_NETWORKS": "true"}), memory)
    patches.install(guard)
    open_video["worker"] = OpenCVVideoBackendMixin.open_video_capture
    connectors = {"worker": MEDIA_CONNECTOR_REGISTRY.load(MEDIA_CONNECTOR), "vLLM": MediaConnector()}
    links = [f"{url}/{index}.jpg" for index in range(PHOTOGRAPHS)]
    inline = [media.data_url((folder / f"{index}.jpg").read_bytes(), "image/jpeg") for index in range(PHOTOGRAPHS)]
    alone = media.data_url(photograph(PHOTOGRAPHS, (1152, 896)), "image/jpeg")
    film = media.data_url((folder / "film.mp4").read_bytes(), "video/mp4")
    seconds: dict[str, list[float]] = {}

    async def timed(name: str, load: Load) -> float:
        began = time.perf_counter()
        await load()
        seconds.setdefault(name, []).append(time.perf_counter() - began)
        return seconds[name][-1]

    for number in range(ROUNDS + 1):
        for name, connector in connectors.items() if number % 2 else reversed(connectors.items()):
            for source, urls in (("links", links), ("base64", inline)):
                usage = Usage()
                current_usage.set(usage)
                account = memory.account()
                current_account.set(account)
                total = await timed(f"{source}, {name}", partial(_load_images, connector, urls))
                account.close()
                if usage.fetches:
                    slowest = max(fetch.seconds for fetch in usage.fetches)
                    seconds.setdefault("links, beyond the slowest fetch", []).append(total - slowest)
            current_account.set(None)
            await timed(f"one image, {name}", partial(connector.fetch_image_async, alone))
            setattr(OpenCVVideoBackendMixin, "open_video_capture", open_video[name])  # noqa: B010 - for mypy
            await timed(f"film, {name}", partial(connector.fetch_video_async, film))
        if number == 0:
            # The first round also starts processes and opens connections.
            seconds.clear()
    await guard.aclose()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {}
    for source in ("links", "base64", "one image", "film"):
        pairs = zip(seconds[f"{source}, worker"], seconds[f"{source}, vLLM"], strict=True)
        ratios[f"{source}, worker to vLLM"] = round(statistics.median(worker / vllm for worker, vllm in pairs), 3)
    return {"ms": {name: round(1000 * value, 1) for name, value in sorted(medians.items())}, "ratio": ratios}


async def _load_images(connector: MediaConnector, urls: list[str]) -> None:
    await asyncio.gather(*(connector.fetch_image_async(url) for url in urls))


if __name__ == "__main__":
    sys.exit(main())
