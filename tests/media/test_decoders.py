"""Decoding media in child processes, which may crash, hang or lie."""

import asyncio
import io
import os
import subprocess
import sys
import textwrap
import time
import wave
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import av
import cv2
import numpy as np
import psutil
import pytest
from PIL import Image

from tests.support import hostile, media
from worker import settings
from worker.errors import MediaError, MediaTooLargeError, MemoryExceededError
from worker.media import structure
from worker.media.checks import Limits
from worker.media.decoders import Decoders, Look, SoundForm
from worker.media.pool import Process
from worker.media.video import Capture
from worker.memory import Account, Budget

T = TypeVar("T")


class Case:
    """Decoders and the account of one request."""

    def __init__(self, memory: int = 4 << 30, **environ: str) -> None:
        self.memory = Budget(memory)
        self.account = self.memory.account()
        self.decoders = Decoders(Limits(settings.read({"MEDIA_PROCESSES": "2", **environ})))

    async def image(self, data: bytes, look: Look = Look(), account: Account | None = None) -> Image.Image:  # noqa: B008
        return (await self.decoders.image(data, look, account or self.account)).image

    async def frames(self, data: bytes, read: Callable[[Capture], T]) -> T:
        """Open a video, and read it in a thread, as vLLM's loaders do."""

        def work(capture: Capture) -> T:
            capture.open(data)
            result = read(capture)
            capture.close()
            return result

        async with self.decoders.capture(self.account) as capture:
            return await self.decoders.pool.in_thread(work, capture)

    async def in_process(self, work: Callable[[Process], T]) -> T:
        async with self.decoders.pool.process(self.account) as process:
            return await self.decoders.pool.in_thread(work, process)


def run(work: Callable[[Case], Coroutine[Any, Any, T]], memory: int = 4 << 30, **environ: str) -> T:
    async def main() -> T:
        case = Case(memory, **environ)
        try:
            return await work(case)
        finally:
            case.decoders.close()

    return asyncio.run(main())


def count(capture: Capture) -> int:
    """Read a video to its end; return how many frames it has."""
    number = 0
    while capture.grab():
        decoded, frame = capture.retrieve()
        assert decoded
        assert frame is not None
        number += 1
    return number


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def children() -> list[psutil.Process]:
    """Return the decoder processes, without those that have just ended."""
    processes = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            processes += [child] if "worker.media.decoder" in child.cmdline() else []
    return processes


FILM = media.film("red", "blue")
PICTURE = media.picture("red")


# ---- Images


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradient(mode: str) -> Image.Image:
    rows = np.arange(64 * 48 * 4, dtype=np.uint32).reshape(48, 64, 4) % 251
    return Image.fromarray(rows.astype(np.uint8), "RGBA").convert(mode)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(gradient("RGB"), "JPEG", exif=exif)


def palette_with_transparency() -> bytes:
    return saved(gradient("RGB").quantize(16), "PNG", transparency=3)


@pytest.mark.parametrize(
    "data",
    [
        *(
            pytest.param(saved(gradient(mode), "PNG"), id=f"PNG {mode}")
            for mode in ("1", "L", "LA", "P", "RGB", "RGBA")
        ),
        *(pytest.param(saved(gradient(mode), "JPEG"), id=f"JPEG {mode}") for mode in ("L", "RGB", "CMYK")),
        *(pytest.param(saved(gradient(mode), "TIFF"), id=f"TIFF {mode}") for mode in ("1", "L", "RGBA", "CMYK", "F")),
        *(pytest.param(saved(gradient("RGBA"), kind), id=f"{kind} RGBA") for kind in ("WEBP", "AVIF", "GIF")),
        pytest.param(saved(gradient("RGB"), "BMP"), id="BMP"),
        pytest.param(saved(gradient("L").convert("I;16"), "PNG"), id="PNG of 16 bits"),
        pytest.param(palette_with_transparency(), id="palette with transparency"),
        pytest.param(rotated(), id="rotated"),
        pytest.param(media.animation("red", "blue"), id="animation"),
    ],
)
@pytest.mark.filterwarnings("ignore:Palette images")
def test_images_are_decoded_as_vllm_does(data: bytes) -> None:
    from vllm.multimodal.media import ImageMediaIO

    for look in (Look(), Look(background=(0, 90, 200)), Look("L"), Look("RGBA")):
        expected = ImageMediaIO(look.mode, rgba_background_color=look.background).load_bytes(data)

        async def decode(case: Case, look: Look = look) -> Any:
            return await case.decoders.image(data, look, case.account)

        decoded = run(decode)
        assert (decoded.image.mode, decoded.image.size) == (expected.media.mode, expected.media.size)
        assert (np.asarray(decoded.image) == np.asarray(expected.media)).all()
        assert decoded.is_converted == (expected.io_config is not None)


KINDS_OF_MODES = {
    "RGB": ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"),
    "RGBA": ("PNG", "WEBP", "GIF", "TIFF", "AVIF"),
    "P": ("PNG", "GIF", "BMP", "TIFF"),
}


@pytest.mark.parametrize(("mode", "kind"), [(mode, kind) for mode, kinds in KINDS_OF_MODES.items() for kind in kinds])
def test_an_honest_large_image_fits_into_its_memory(mode: str, kind: str) -> None:
    """Its process may use a fixed number of bytes for each pixel that the header claims."""
    noise = np.random.default_rng(1).integers(0, 256, (1500, 2000, 4), dtype=np.uint8)
    image = Image.fromarray(noise, "RGBA")
    if mode == "P":
        image = image.quantize(64, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    options = {"transparency": 1} if (kind, mode) == ("PNG", "P") else {"speed": 10} if kind == "AVIF" else {}
    data = saved(image.convert("RGB") if mode == "RGB" else image, kind, **options)

    async def decode(case: Case) -> int:
        decoded = await case.image(data)
        assert decoded.size == (2000, 1500)
        return case.account.held

    assert run(decode, MAX_IMAGE_BYTES="60000000") == 4 * 2000 * 1500


def test_a_webp_image_of_40_megapixels() -> None:
    data = saved(Image.new("RGB", (8000, 5000), "red"), "WEBP", lossless=True)
    assert run(lambda case: case.image(data)).size == (8000, 5000)


@pytest.mark.parametrize(
    "options", [{"lossless": True}, {"quality": 50}, {"quality": 50, "exif": b"Exif\0\0II*\0\0\0\0\0"}]
)
def test_the_size_of_a_webp_image_is_read_from_its_header(options: dict[str, Any]) -> None:
    assert structure.webp_size(saved(Image.new("RGB", (801, 77), "red"), "WEBP", **options)) == (801, 77)


def test_a_progressive_jpeg_with_a_trailer() -> None:
    trailer = np.random.default_rng(1).bytes(8_000_000)
    structure.check_jpeg(saved(gradient("RGB"), "JPEG", progressive=True) + trailer)


def test_many_large_images_of_one_request_take_their_turns() -> None:
    """Decoding two at once fits into the memory, and so do all results together."""
    data = saved(Image.new("RGB", (2500, 2000), "red"), "PNG")

    async def decode(case: Case) -> None:
        images = await asyncio.gather(*(case.image(data) for _ in range(20)))
        assert {image.size for image in images} == {(2500, 2000)}

    run(decode, memory=650_000_000)


def test_a_video_that_is_refused_leaves_no_memory_behind() -> None:
    async def decode(case: Case) -> None:
        with pytest.raises(MediaTooLargeError):
            await case.frames(FILM, count)
        assert not case.decoders.pool._idle

    run(decode, MAX_VIDEO_PIXELS="10000")


def test_a_load_that_is_cancelled_before_its_turn_harms_nobody() -> None:
    async def decode(case: Case) -> None:
        other = case.memory.account()
        holding = [asyncio.create_task(_hold(case, case.account, is_long=False)) for _ in range(2)]
        await asyncio.sleep(0.5)
        waiting = [asyncio.create_task(case.image(PICTURE)) for _ in range(3)]
        await asyncio.sleep(0)
        for task in (*holding, *waiting):
            task.cancel()
        await asyncio.gather(*holding, *waiting, return_exceptions=True)
        assert (await case.image(PICTURE, account=other)).size == (64, 64)
        assert not case.decoders.pool._using
        assert not case.decoders.pool._callers

    run(decode)


def test_images_for_which_there_is_no_memory() -> None:
    async def decode(case: Case) -> None:
        with pytest.raises(MemoryExceededError):
            await case.image(PICTURE)
        assert case.memory.held == 0

    run(decode, memory=64 * 64)


def test_an_image_waits_for_memory_and_lends_its_process_to_others_meanwhile() -> None:
    async def decode(case: Case) -> None:
        first, second = case.memory.account(), case.memory.account()
        await first.take(4 << 30)
        waiting = asyncio.create_task(case.image(PICTURE, account=second))
        while not case.memory._waiting or case.decoders.pool._using:  # noqa: ASYNC110 - the test ends after a while
            await asyncio.sleep(0.05)
        first.close()
        assert (await waiting).size == (64, 64)

    run(decode)


def test_scaled_down() -> None:
    data = media.picture("orange", (400, 100))
    assert run(lambda case: case.image(data), IMAGE_DOWNSCALE_PIXELS="10000").size == (200, 50)


def test_a_mode_that_pillow_does_not_have() -> None:
    with pytest.raises(MediaError, match="accepted are"):
        run(lambda case: case.image(PICTURE, Look("XYZ")))


def test_decoding_that_takes_too_long_ends() -> None:
    async def decode(case: Case) -> None:
        await case.image(PICTURE)
        (process,) = children()
        process.suspend()
        with pytest.raises(MediaTooLargeError, match=r"IMAGE_DECODE_TIMEOUT=0\.3"):
            await case.image(PICTURE)
        await asyncio.to_thread(process.wait, 10)
        assert (await case.image(PICTURE)).size == (64, 64)

    run(decode, IMAGE_DECODE_TIMEOUT="0.3")


def test_decoding_ends_when_the_request_is_cancelled() -> None:
    async def decode(case: Case) -> None:
        await case.image(PICTURE)
        (process,) = children()
        process.suspend()
        decoding = asyncio.create_task(case.image(PICTURE))
        await asyncio.sleep(0.1)
        decoding.cancel()
        await asyncio.gather(decoding, return_exceptions=True)
        await asyncio.to_thread(process.wait, 10)
        assert (await case.image(PICTURE)).size == (64, 64)

    run(decode)


# ---- Sounds


def sine(channels: int = 1, seconds: float = 0.5, rate: int = 16_000) -> bytes:
    file, times = io.BytesIO(), np.arange(int(seconds * rate)) / rate
    waves = np.stack([np.sin(2 * np.pi * 440 * (channel + 1) * times) for channel in range(channels)], axis=1)
    with wave.open(file, "wb") as sound:
        sound.setparams((channels, 2, rate, 0, "NONE", ""))
        sound.writeframes((waves * 32000).astype(np.int16).tobytes())
    return file.getvalue()


def encoded(container: str, codec: str) -> bytes:
    file = io.BytesIO()
    with av.open(io.BytesIO(sine(2, rate=48_000)), "r") as source, av.open(file, "w", format=container) as target:
        stream = target.add_stream(codec, rate=48_000)
        assert isinstance(stream, av.AudioStream)
        for frame in (*source.decode(source.streams.audio[0]), None):
            target.mux(stream.encode(frame))
    return file.getvalue()


def decoded_sound(data: bytes, form: SoundForm = SoundForm()) -> tuple[np.ndarray, int]:  # noqa: B008
    return run(lambda case: case.decoders.sound(data, form, case.account))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [None, 16_000, 8_000])
def test_sounds_are_decoded_as_vllm_does(channels: int, rate: int | None) -> None:
    from vllm.multimodal.media.audio import load_audio_soundfile

    data = sine(channels)
    expected, expected_rate = load_audio_soundfile(io.BytesIO(data), sr=rate)
    samples, actual_rate = decoded_sound(data, SoundForm(rate))
    assert (actual_rate, str(samples.dtype)) == (expected_rate, "float32")
    assert abs(len(samples) - len(expected)) <= 32
    length = min(len(samples), len(expected))
    assert np.abs(samples[:length] - expected[:length]).max() < 0.05
    assert np.corrcoef(samples[:length], expected[:length])[0, 1] > 0.999


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mp3", "mp3"), ("flac", "flac"), ("ogg", "libopus"), ("adts", "aac"), ("mp4", "aac"), ("webm", "libopus")],
)
def test_every_format_of_sounds(container: str, codec: str) -> None:
    samples, rate = decoded_sound(encoded(container, codec))
    assert rate == 48_000
    assert abs(len(samples) / rate - 0.5) < 0.1
    assert np.abs(samples).max() > 0.3


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (SoundForm(seconds=0.2), "VLLM_MAX_AUDIO_DECODE_DURATION_S=0.2"),
        (SoundForm(size=1000), "VLLM_MAX_AUDIO_DECODE_BYTES"),
    ],
)
def test_sounds_beyond_a_limit(form: SoundForm, message: str) -> None:
    with pytest.raises(MediaTooLargeError, match=message):
        decoded_sound(sine(), form)


@pytest.mark.parametrize("data", [data for _, data in hostile.sounds()], ids=[name for name, _ in hostile.sounds()])
def test_hostile_sounds(data: bytes) -> None:
    with pytest.raises(MediaError):
        decoded_sound(data)


# ---- Videos


def test_a_process_is_reused() -> None:
    async def decode(case: Case) -> None:
        assert [await case.frames(FILM, count) for _ in range(3)] == [16] * 3
        assert len(children()) == 1

    run(decode)


def test_several_videos_are_decoded_at_once() -> None:
    async def decode(case: Case) -> None:
        assert await asyncio.gather(*(case.frames(FILM, count) for _ in range(12))) == [16] * 12
        assert len(children()) == 2

    run(decode)


def read_as_vllm_does(capture: Capture) -> int:
    capture.set(cv2.CAP_PROP_POS_AVI_RATIO, 1.0)
    capture.grab()
    capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
    return count(capture)


@pytest.mark.parametrize("file", sorted(hostile.FOLDER.glob("crash.*")), ids=lambda file: str(file.name))
def test_a_process_that_crashes_is_replaced(file: Path) -> None:
    damaged = file.read_bytes()

    async def decode(case: Case) -> None:
        with pytest.raises(MediaError, match="damaged"):
            await case.frames(damaged, read_as_vllm_does)
        assert await case.frames(FILM, count) == 16

    run(decode)


def test_an_idle_process_that_has_died_is_replaced() -> None:
    async def decode(case: Case) -> None:
        await case.decoders.pool.prepare()
        (idle,) = children()
        idle.kill()
        await asyncio.to_thread(idle.wait, 10)
        assert await case.frames(FILM, count) == 16

    run(decode)


def test_read_returns_every_frame() -> None:
    def read(capture: Capture) -> int:
        number = 0
        while capture.read()[0]:
            number += 1
        return number

    assert run(lambda case: case.frames(FILM, read)) == 16


def test_a_crashed_process_leaves_no_file_descriptor_open() -> None:
    async def decode(case: Case) -> None:
        await case.frames(FILM, count)
        before = open_files()
        for _ in range(3):
            with pytest.raises(MediaError):
                await case.frames((hostile.FOLDER / "crash.mp4").read_bytes(), read_as_vllm_does)
        await case.frames(FILM, count)
        assert open_files() <= before

    run(decode)


# ---- The pool


@pytest.mark.parametrize("is_long", [False, True], ids=["images", "videos"])
def test_slow_media_of_others_do_not_hold_up_a_request(is_long: bool) -> None:
    """Four requests have as many media as they may, and many more wait."""

    async def decode(case: Case) -> float:
        hostile_requests = [case.memory.account() for _ in range(4)]
        greedy = [
            asyncio.create_task(_hold(case, request, is_long)) for request in hostile_requests[:3] for _ in range(20)
        ]
        await asyncio.sleep(1)
        began = time.monotonic()
        await case.image(PICTURE)
        for task in greedy:
            task.cancel()
        await asyncio.gather(*greedy, return_exceptions=True)
        return time.monotonic() - began

    assert run(decode) < 5


def test_lines_of_batches_come_last_and_never_start_more_processes() -> None:
    async def decode(case: Case) -> None:
        users: list[Account] = []
        lines = [case.memory.account(is_line=True) for _ in range(20)]

        async def use(request: Account) -> None:
            async with case.decoders.pool.process(request):
                users.append(request)
                await asyncio.sleep(0.1)

        tasks = [asyncio.create_task(use(line)) for line in lines]
        # Longer than media of callers wait for a process that is in use.
        await asyncio.sleep(0.55)
        assert len(children()) == 1
        caller = case.memory.account()
        await use(caller)
        place = users.index(caller)
        await asyncio.gather(*tasks)
        assert place < 10

    run(decode, MEDIA_PROCESSES="1")


def test_processes_are_kept_while_others_wait_for_them() -> None:
    """Each start takes as long as decoding ten photographs."""

    async def decode(case: Case) -> None:
        await case.image(PICTURE)
        starts: list[Process] = []
        start = case.decoders.pool._start

        def counted() -> Process:
            starts.append(start())
            return starts[-1]

        case.decoders.pool._start = counted

        async def use() -> None:
            async with case.decoders.pool.process(case.memory.account()):
                # All end at the same time.
                await asyncio.sleep(0.3 - time.monotonic() % 0.3)

        await asyncio.gather(*(use() for _ in range(80)))
        assert len(starts) <= 7

    run(decode, MEDIA_PROCESSES="2")


async def _hold(case: Case, request: Account, is_long: bool) -> None:
    async with case.decoders.pool.process(request, is_long=is_long):
        await asyncio.Event().wait()


def test_large_shared_memory_is_freed_after_use() -> None:
    data = saved(Image.new("RGB", (6000, 4500), "white"), "PNG")

    async def decode(case: Case) -> int:
        await case.image(data)
        (process,) = case.decoders.pool._idle
        return sum(process.memory[at] for at in range(0, 81_000_000, 4096))

    assert run(decode) == 0


def test_a_process_has_no_secrets_and_ends_with_its_worker() -> None:
    program = """
        import asyncio, time
        from worker import settings
        from worker.media.checks import Limits
        from worker.media.decoders import Decoders
        async def main():
            decoders = Decoders(Limits(settings.read({})))
            await decoders.pool.prepare()
            print("ready", flush=True)
            time.sleep(60)
        asyncio.run(main())
    """
    environment = {**os.environ, "HF_TOKEN": "s3cret"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        (decoder,) = psutil.Process(worker.pid).children()
        for _ in range(100):
            if "worker.media.decoder" in decoder.cmdline():
                break
            time.sleep(0.05)
        assert "s3cret" not in str(decoder.environ())
        worker.kill()
        worker.wait()
    decoder.wait(timeout=10)


def test_a_process_can_open_no_file_and_no_socket() -> None:
    async def read(case: Case) -> str:
        await case.image(PICTURE)
        (process,) = children()
        files = [Path(f"/proc/{process.pid}/{name}") for name in ("limits", "status")]
        return "".join([await asyncio.to_thread(file.read_text) for file in files])

    text = run(read)
    assert "Max open files            0                    0" in text
    assert "NoNewPrivs:\t1" in text
