"""vLLM's media connector with the worker's guard: what is taken, what is not, and in which words. No engine runs."""

import asyncio
import io
import json
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY
from vllm.renderers.chat_utils import parse_chat_messages_async

from tests.support import hostile, media, tiny
from tests.support.links import Server
from worker.engine import connector as guarding
from worker.errors import JobError, MediaError
from worker.media.checks import Limit, read_file
from worker.settings import settings as config
from worker.telemetry.usage import Meter, metered

OPEN = {"MEDIA_ALLOW_PRIVATE_NETWORKS": "true", "MEDIA_FETCH_TIMEOUT": "5"}


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


async def connected(kind: str, links: list[str], folder: str = "", **environ: str) -> list[Any]:
    """Load all links at once, as vLLM does for the parts of one request; an exception stands for what is refused."""
    guard = guarding.guard(config.load({**OPEN, **environ}), None)
    guarding.install(guard)
    connector = MEDIA_CONNECTOR_REGISTRY.load(guarding.NAME, media_io_kwargs={}, allowed_local_media_path=folder)
    try:
        loads = [getattr(connector, f"fetch_{kind}_async")(link) for link in links]
        return await asyncio.gather(*loads, return_exceptions=True)
    finally:
        await guard.aclose()


def load(kind: str, link: str, folder: str = "", **environ: str) -> Any:
    (loaded,) = asyncio.run(connected(kind, [link], folder, **environ))
    if isinstance(loaded, BaseException):
        raise loaded
    return loaded


def refused(kind: str, link: str, folder: str = "", **environ: str) -> JobError:
    with pytest.raises(guarding._RefusalError) as caught:
        load(kind, link, folder, **environ)
    assert caught.value.http_status == caught.value.error.status
    return caught.value.error


def url(data: bytes, media_type: str = "application/octet-stream") -> str:
    return media.data_url(data, media_type)


def colour(pixel: Any) -> np.ndarray:
    return np.round(np.asarray(pixel, dtype=float) / 64)


# ---- What is taken


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_every_image_format_whatever_the_link_calls_it(kind: str) -> None:
    image = load("image", url(media.picture("orange", (70, 50), kind), "text/plain"))
    assert (image.size, image.mode) == ((70, 50), "RGB")
    assert (colour(image.getpixel((35, 25))) == colour(media.shade("orange"))).all()


def test_a_photograph_stands_upright() -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40)).save(file, "JPEG", exif=exif)
    assert load("image", url(file.getvalue())).size == (40, 80)


def test_a_moving_image_is_its_first_frame_or_a_video() -> None:
    animation = url(media.animation("red", "blue"), "image/gif")
    assert (colour(load("image", animation).getpixel((32, 32))) == colour(media.shade("red"))).all()
    frames, about = load("video", animation)
    assert (len(frames), round(about["duration"])) == (16, 2)
    assert (colour(frames[-1][32, 32]) == colour(media.shade("blue"))).all()


@pytest.mark.parametrize("kind", ["mp4", "mov", "webm", "mkv", "avi"])
def test_every_video_format(kind: str) -> None:
    frames, about = load("video", url(media.film("red", "blue", kind=kind)))
    assert (frames.shape, about["fps"]) == ((16, 64, 64, 3), 8.0)
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
def test_sound(sound: Any) -> None:
    samples, rate = load("audio", url(sound()))
    assert rate == 16_000
    assert len(samples) == pytest.approx(16_000, rel=0.2)


def test_a_link_and_a_file(server: Server, tmp_path: Path) -> None:
    assert load("image", f"{server.url}/picture/red").size == (64, 64)
    assert load("video", f"{server.url}/film/red-blue")[0].shape == (16, 64, 64, 3)
    (tmp_path / "a b.png").write_bytes(media.picture("red"))
    assert load("image", f"file://{tmp_path}/a%20b.png", str(tmp_path)).size == (64, 64)


def test_a_large_image_is_scaled_down_if_that_is_wanted() -> None:
    image = url(media.picture("red", (400, 100)))
    assert load("image", image).size == (400, 100)
    smaller = load("image", image, IMAGE_DOWNSCALE_PIXELS="10000")
    assert smaller.size == (200, 50)
    assert smaller.io_config == {"downscale_pixels": 10_000}


def test_routes_that_load_from_another_thread(server: Server) -> None:
    async def run() -> Any:
        guard = guarding.guard(config.load(OPEN), None)
        guarding.install(guard)
        guarding.Connector.loop = asyncio.get_running_loop()
        connector = MEDIA_CONNECTOR_REGISTRY.load(guarding.NAME)
        try:
            return await asyncio.to_thread(connector.fetch_image, f"{server.url}/picture/red")
        finally:
            await guard.aclose()

    assert asyncio.run(run()).size == (64, 64)


def test_links_are_fetched_at_the_same_time_and_each_once(server: Server) -> None:
    async def run() -> tuple[list[Any], Meter, float]:
        meter = Meter()
        metered.set(meter)
        began = asyncio.get_running_loop().time()
        links = [f"{server.url}/slow/0.5", f"{server.url}/slow/0.50", f"{server.url}/slow/0.5"]
        loaded = await connected("image", links)
        return loaded, meter, asyncio.get_running_loop().time() - began

    loaded, meter, seconds = asyncio.run(run())
    assert [image.size for image in loaded] == [(64, 64)] * 3
    assert sorted(server.hits) == ["/slow/0.5", "/slow/0.50"]
    assert len(meter.fetches) == 2
    assert seconds < 1


# ---- What is not


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
    error = refused(kind, link)
    assert error.http_status in (400, 413)
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
def test_links_that_lead_to_nothing(server: Server, path: str, status: int, message: str) -> None:
    error = refused("image", f"{server.url}/{path}", MEDIA_FETCH_TIMEOUT="0.5" if path == "drip/" else "5")
    assert error.http_status == status
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
def test_links_that_are_not_taken(link: str, environ: dict[str, str], status: int) -> None:
    error = refused("image", link, **environ)
    assert error.http_status == status
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
    error = refused("video", url(media.film("red", "blue")), **environ)
    assert error.http_status == 413
    assert message in str(error)


def test_a_video_without_a_frame_that_can_be_read() -> None:
    film = bytearray(media.film("red", "blue", kind="webm"))
    film[len(film) // 3 : -60] = bytes(len(film) - 60 - len(film) // 3)
    assert "damaged" in str(refused("video", url(bytes(film))))


def test_a_sound_that_is_too_long_names_vllms_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MAX_AUDIO_DECODE_DURATION_S", "0")
    error = refused("audio", url(wav()))
    assert (error.http_status, "VLLM_MAX_AUDIO_DECODE_DURATION_S" in str(error)) == (413, True)


def test_files_that_are_not_read_are_closed(tmp_path: Path) -> None:
    def attempt() -> int:
        for path in (".", "none.png"):
            with pytest.raises(MediaError):
                read_file(f"file://{tmp_path}/{path}", tmp_path, Limit("MAX_IMAGE_BYTES", 100))
        return len(list(Path("/proc/self/fd").iterdir()))

    assert attempt() == attempt()


def test_files_outside_the_folder(tmp_path: Path) -> None:
    folder, outside = tmp_path / "media", tmp_path / "secret.png"
    folder.mkdir()
    outside.write_bytes(media.picture("red"))
    (folder / "link.png").symlink_to(outside)
    (folder / "etc").symlink_to("/etc")
    (folder / "zero").symlink_to("/dev/zero")
    for path in ("secret.png", "media/../secret.png", "media/link.png", "media/etc/passwd", "media/zero", "media"):
        assert refused("image", f"file://{tmp_path}/{path}", str(folder)).http_status in (400, 403)
    assert refused("image", f"file://host{folder}/x.png", str(folder)).http_status == 403
    assert refused("image", f"file://{folder}/none.png", str(folder)).http_status == 400
    assert refused("image", f"file://{folder}/%00", str(folder)).http_status == 400


# ---- How it is said


def answered(body: dict[str, Any], error: Exception) -> MediaError | None:
    token = guarding._body.set([json.dumps(body).encode()])
    try:
        return guarding._explained(error)
    finally:
        guarding._body.reset(token)


def test_the_part_is_named(server: Server) -> None:
    content = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": f"{server.url}/status/404"}}]
    guarding._body.set([json.dumps({"messages": [{"role": "user", "content": content}]}).encode()])
    error = refused("image", f"{server.url}/status/404")
    assert error.param == "messages[0].content[1]"
    assert str(error).startswith("messages[0].content[1], an image: the link's server answered with HTTP status 404")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The configuration of a model that takes text only, and that has been told how many images it takes."""
    folder = tmp_path_factory.mktemp("text")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 512}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    about = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **sizes, **heads}
    (folder / "config.json").write_text(json.dumps(about))
    arguments = AsyncEngineArgs(str(folder), tokenizer=str(tiny.MODEL), limit_mm_per_prompt={"image": 2})
    return arguments.create_model_config()


def test_a_model_of_text_only_says_so(text_model: Any) -> None:
    messages: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y"}}]}]
    with pytest.raises(ValueError, match="multimodal") as caught:
        asyncio.run(parse_chat_messages_async(messages, text_model, "openai"))
    error = answered({"messages": messages}, caught.value)
    assert error is not None
    assert str(error) == "messages[0].content[0]: the model takes text only, no images, videos or sounds."


def test_too_many_are_counted_in_the_request() -> None:
    parts = [{"type": "image_url", "image_url": {"url": "https://x/y"}}] * 3
    error = answered(
        {"messages": [{"content": parts}]}, ValueError("At most 2 image(s) may be provided in one prompt.")
    )
    assert error is not None
    assert (error.param, "IMAGE_LIMIT" in str(error)) == ("messages[0].content[2]", True)
    none = answered({"messages": [{"content": parts}]}, ValueError("At most 0 image(s) may be provided in one prompt."))
    assert none is not None
    assert none.param == "messages[0].content[0]"
    assert answered({}, ValueError("anything else")) is None
