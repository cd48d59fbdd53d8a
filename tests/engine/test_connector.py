"""vLLM's media connector with the worker's guard: which media it accepts, and which it rejects. No engine runs."""

import asyncio
import io
import json
import wave
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

from tests.support import hostile, media
from tests.support.links import Server
from worker import settings
from worker.engine import patches
from worker.engine.connector import Guard
from worker.engine.media_errors import RejectedMediaError, keep_bodies
from worker.errors import JobError, MediaError
from worker.media.checks import Limit, read_file
from worker.memory import Budget, current_account
from worker.request.asgi import Message, Receive, Request, Send, exchange
from worker.settings.environment import MEDIA_CONNECTOR
from worker.telemetry.usage import Usage, current_usage

ENVIRONMENT = {"MEDIA_ALLOW_PRIVATE_NETWORKS": "true", "MEDIA_FETCH_TIMEOUT": "5"}


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@asynccontextmanager
async def connector(folder: str = "", **environ: str) -> AsyncIterator[Any]:
    """A connector as vLLM creates it for a request."""
    local_files = Path(folder) if folder else None
    guard = Guard(settings.read({**ENVIRONMENT, **environ}), Budget(2 << 30), folder=local_files)
    patches.install(guard)
    async with aclosing(guard):
        yield MEDIA_CONNECTOR_REGISTRY.load(MEDIA_CONNECTOR, media_io_kwargs={})


async def load_all(kind: str, links: list[str], folder: str = "", **environ: str) -> list[Any]:
    """Load all links at once, as vLLM does for the parts of one request. A failed load returns its exception."""
    async with connector(folder, **environ) as request_connector:
        loads = [getattr(request_connector, f"fetch_{kind}_async")(link) for link in links]
        return await asyncio.gather(*loads, return_exceptions=True)


def load(kind: str, link: str, folder: str = "", **environ: str) -> Any:
    (loaded,) = asyncio.run(load_all(kind, [link], folder, **environ))
    if isinstance(loaded, BaseException):
        raise loaded
    return loaded


def rejection(kind: str, link: str, folder: str = "", **environ: str) -> JobError:
    with pytest.raises(RejectedMediaError) as caught:
        load(kind, link, folder, **environ)
    assert caught.value.http_status == caught.value.error.status
    return caught.value.error


def url(data: bytes, media_type: str = "application/octet-stream") -> str:
    return media.data_url(data, media_type)


def colour(pixel: Any) -> np.ndarray:
    return np.round(np.asarray(pixel, dtype=float) / 64)


# ---- Accepted media


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_every_image_format_even_with_a_wrong_media_type(kind: str) -> None:
    image = load("image", url(media.picture("orange", (70, 50), kind), "text/plain"))
    assert (image.size, image.mode) == ((70, 50), "RGB")
    assert (colour(image.getpixel((35, 25))) == colour(media.shade("orange"))).all()


def test_a_photograph_is_rotated_as_its_metadata_says() -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40)).save(file, "JPEG", exif=exif)
    assert load("image", url(file.getvalue())).size == (40, 80)


def test_an_animation_is_loaded_as_its_first_frame_or_as_a_video() -> None:
    animation = url(media.animation("red", "blue"), "image/gif")
    assert (colour(load("image", animation).getpixel((32, 32))) == colour(media.shade("red"))).all()
    frames, metadata = load("video", animation)
    assert (len(frames), round(metadata["duration"])) == (16, 2)
    assert (colour(frames[-1][32, 32]) == colour(media.shade("blue"))).all()


@pytest.mark.parametrize("kind", ["mp4", "mov", "webm", "mkv", "avi"])
def test_every_video_format(kind: str) -> None:
    frames, metadata = load("video", url(media.film("red", "blue", kind=kind)))
    assert (frames.shape, metadata["fps"]) == ((16, 64, 64, 3), 8.0)
    assert (colour(frames[0][32, 32]) == colour(media.shade("red"))).all()
    assert (colour(frames[-1][32, 32]) == colour(media.shade("blue"))).all()


def test_a_list_of_frames() -> None:
    frames, _ = load("video", media.frames("red", "blue"))
    assert frames.shape == (4, 64, 64, 3)
    assert (colour(frames[-1][32, 32]) == colour(media.shade("blue"))).all()


def wav() -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 16_000, 0, "NONE", ""))
        sound.writeframes(bytes(32_000))
    return file.getvalue()


def m4a() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="ipod") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        for _ in range(16):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate = 16_000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize("sound", [wav, m4a])
def test_audio(sound: Any) -> None:
    samples, rate = load("audio", url(sound()))
    assert rate == 16_000
    assert len(samples) == pytest.approx(16_000, rel=0.2)


def test_links_and_files(server: Server, tmp_path: Path) -> None:
    assert load("image", f"{server.url}/picture/red").size == (64, 64)
    assert load("video", f"{server.url}/film/red-blue")[0].shape == (16, 64, 64, 3)
    (tmp_path / "a b.png").write_bytes(media.picture("red"))
    assert load("image", f"file://{tmp_path}/a%20b.png", str(tmp_path)).size == (64, 64)


def test_image_downscale_pixels_scales_large_images_down() -> None:
    image = url(media.picture("red", (400, 100)))
    assert load("image", image).size == (400, 100)
    smaller = load("image", image, IMAGE_DOWNSCALE_PIXELS="10000")
    assert smaller.size == (200, 50)
    assert smaller.io_config == {"downscale_pixels": 10_000}


def test_routes_that_load_from_another_thread(server: Server) -> None:
    async def run() -> Any:
        async with connector() as request_connector:
            return await asyncio.to_thread(request_connector.fetch_image, f"{server.url}/picture/red")

    assert asyncio.run(run()).size == (64, 64)


def test_the_event_loop_does_not_wait_for_itself() -> None:
    async def run() -> None:
        async with connector() as request_connector:
            with pytest.raises(RuntimeError, match="event loop"):
                request_connector.fetch_image(url(media.picture("red")))

    asyncio.run(run())


def test_links_are_fetched_concurrently_and_each_only_once(server: Server) -> None:
    async def run() -> tuple[list[Any], Usage, float]:
        usage = Usage()
        current_usage.set(usage)
        current_account.set(Budget(1 << 30).account())
        began = asyncio.get_running_loop().time()
        links = [f"{server.url}/slow/3", f"{server.url}/slow/3.0", f"{server.url}/slow/3"]
        loaded = await load_all("image", links)
        return loaded, usage, asyncio.get_running_loop().time() - began

    loaded, usage, seconds = asyncio.run(run())
    assert [image.size for image in loaded] == [(64, 64)] * 3
    assert sorted(server.hits) == ["/slow/3", "/slow/3.0"]
    assert len(usage.fetches) == 2
    assert seconds < 6


# ---- Rejected media


@pytest.mark.parametrize(
    ("kind", "link"),
    [
        pytest.param(kind, url(data), id=f"{kind}-{name}")
        for kind, files in (("image", hostile.images), ("video", hostile.videos), ("audio", hostile.sounds))
        for name, data in files()
    ]
    + [pytest.param("video", f"data:video/jpeg;base64,{text}", id=name) for name, text in hostile.frames()],
)
def test_hostile_files(kind: str, link: str) -> None:
    error = rejection(kind, link)
    assert error.status in (400, 413)
    assert "passwd" not in str(error)


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        pytest.param("status/404", 422, "HTTP status 404", id="404"),
        pytest.param("status/503", 424, "HTTP status 503", id="503"),
        pytest.param("drip/", 504, "MEDIA_FETCH_TIMEOUT=0.5 s", id="drip"),
        pytest.param("endless/", 413, "MAX_IMAGE_BYTES=20000000", id="endless"),
        pytest.param("redirect/http://u:p@example.org/", 403, "user name", id="redirect"),
        pytest.param("hello", 400, "no known image format", id="no image"),
    ],
)
def test_links_without_an_image(server: Server, path: str, status: int, message: str) -> None:
    error = rejection("image", f"{server.url}/{path}", MEDIA_FETCH_TIMEOUT="0.5" if path == "drip/" else "5")
    assert error.status == status
    assert message in str(error)


@pytest.mark.parametrize(
    ("link", "environ", "status"),
    [
        pytest.param("http://127.0.0.1/x.png", {"MEDIA_ALLOW_PRIVATE_NETWORKS": "false"}, 403, id="inside"),
        pytest.param("https://example.org/", {"MEDIA_ALLOWED_DOMAINS": "*.example.com"}, 403, id="domain"),
        pytest.param(
            "http://example.org:81/",
            {"MEDIA_ALLOW_PRIVATE_NETWORKS": "false", "MEDIA_ALLOWED_PORTS": "80,443"},
            403,
            id="port",
        ),
        pytest.param("s3://bucket/key", {}, 403, id="s3"),
        pytest.param("example.org/x.png", {}, 403, id="no scheme"),
        pytest.param("file:///etc/passwd", {}, 403, id="file"),
        pytest.param("data:image/png,xyz", {}, 400, id="data without base64"),
        pytest.param("data:image/png;base64,x!", {}, 400, id="no base64"),
        pytest.param("data:", {}, 400, id="data without data"),
        pytest.param(url(media.picture("red")), {"MAX_IMAGE_BYTES": "100"}, 413, id="bytes"),
        pytest.param(url(media.picture("red")), {"MAX_IMAGE_PIXELS": "100"}, 413, id="pixels"),
    ],
)
def test_links_that_are_not_allowed(link: str, environ: dict[str, str], status: int) -> None:
    error = rejection("image", link, **environ)
    assert error.status == status
    assert all(name in str(error) for name in environ if name.startswith(("MAX", "MEDIA_ALLOWED")))


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"MAX_VIDEO_BYTES": "100"}, "MAX_VIDEO_BYTES=100"),
        ({"MAX_VIDEO_SECONDS": "1"}, "it is 2 s long, which is more than MAX_VIDEO_SECONDS=1"),
        ({"MAX_VIDEO_PIXELS": "10000"}, "VIDEO_MAX_FRAMES"),
        ({"MAX_IMAGE_PIXELS": "1000"}, "it is 64 x 64 pixels large"),
        ({"MEDIA_DECODE_TIMEOUT": "0.000001"}, "MEDIA_DECODE_TIMEOUT=1e-06"),
    ],
)
def test_videos_beyond_a_limit(environ: dict[str, str], message: str) -> None:
    error = rejection("video", url(media.film("red", "blue")), **environ)
    assert error.status == 413
    assert message in str(error)


def test_a_video_without_a_readable_frame() -> None:
    film = bytearray(media.film("red", "blue", kind="webm"))
    film[len(film) // 3 : -60] = bytes(len(film) - 60 - len(film) // 3)
    assert "damaged" in str(rejection("video", url(bytes(film))))


def test_the_error_for_audio_that_is_too_long_names_vllms_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MAX_AUDIO_DECODE_DURATION_S", "0")
    error = rejection("audio", url(wav()))
    assert (error.status, "VLLM_MAX_AUDIO_DECODE_DURATION_S" in str(error)) == (413, True)


def test_files_that_cannot_be_read_are_closed(tmp_path: Path) -> None:
    def attempt() -> int:
        for path in (".", "none.png"):
            with pytest.raises(MediaError):
                read_file(f"file://{tmp_path}/{path}", tmp_path, Limit("MAX_IMAGE_BYTES", 100))
        # Other threads open and close other files.
        return sum(str(file.resolve()).startswith(str(tmp_path)) for file in Path("/proc/self/fd").iterdir())

    assert attempt() == attempt() == 0


def test_files_outside_the_folder_are_rejected(tmp_path: Path) -> None:
    folder, outside = tmp_path / "media", tmp_path / "secret.png"
    folder.mkdir()
    outside.write_bytes(media.picture("red"))
    (folder / "link.png").symlink_to(outside)
    (folder / "etc").symlink_to("/etc")
    (folder / "zero").symlink_to("/dev/zero")
    for path in ("secret.png", "media/../secret.png", "media/link.png", "media/etc/passwd", "media/zero", "media"):
        assert rejection("image", f"file://{tmp_path}/{path}", str(folder)).status in (400, 403)
    assert rejection("image", f"file://host{folder}/x.png", str(folder)).status == 403
    assert rejection("image", f"file://{folder}/none.png", str(folder)).status == 400
    assert rejection("image", f"file://{folder}/%00", str(folder)).status == 400


def test_the_error_names_the_part_of_the_request(server: Server) -> None:
    link = f"{server.url}/status/404"
    content = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": link}}]
    errors: list[JobError] = []

    async def app(_scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        async with connector() as request_connector:
            with pytest.raises(RejectedMediaError) as caught:
                await request_connector.fetch_image_async(link)
        errors.append(caught.value.error)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    async def run() -> None:
        request = Request("POST", "/", body=json.dumps({"messages": [{"role": "user", "content": content}]}).encode())
        async with exchange(keep_bodies(app), request) as response:
            await response.read_all()

    asyncio.run(run())
    (error,) = errors
    assert error.param == "messages[0].content[1]"
    assert str(error).startswith("messages[0].content[1], an image: the link's server answered with HTTP status 404")


# ---- Uploads for transcription and translation, which vLLM decodes without a connector
