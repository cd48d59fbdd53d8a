"""Decoding videos in child processes, which may crash or hang."""

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import psutil
import pytest

from tests.support import hostile, media
from worker.errors import MediaError
from worker.media.checks import Limits
from worker.media.video import Capture, Decoders
from worker.settings import settings

LIMITS = Limits(settings.read({}))


@pytest.fixture
def decoders() -> Iterator[Decoders]:
    decoders = Decoders(LIMITS)
    yield decoders
    decoders.close()


def opened(decoders: Decoders, data: bytes) -> Capture:
    capture = decoders.capture()
    capture.open(data)
    return capture


def frames_of(capture: Capture) -> int:
    """Read a video to its end; return how many frames it has."""
    count = 0
    while capture.grab():
        decoded, frame = capture.retrieve()
        assert decoded
        assert frame is not None
        count += 1
    capture.close()
    return count


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "worker.media.decoder" in child.cmdline()]


def test_a_process_is_reused(decoders: Decoders) -> None:
    film = media.film("red", "blue")
    assert [frames_of(opened(decoders, film)) for _ in range(3)] == [16] * 3
    assert len(children()) == 1


def test_several_videos_are_decoded_at_once(decoders: Decoders) -> None:
    film = media.film("red", "blue")
    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(lambda _: frames_of(opened(decoders, film)), range(12)))
    assert counts == [16] * 12
    assert 1 <= len(children()) <= 2


def read_as_vllm_does(decoders: Decoders, data: bytes) -> None:
    capture = opened(decoders, data)
    capture.set(cv2.CAP_PROP_POS_AVI_RATIO, 1.0)
    capture.grab()
    capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
    frames_of(capture)


@pytest.mark.parametrize("file", sorted(hostile.FOLDER.glob("crash.*")), ids=lambda file: str(file.name))
def test_a_process_that_crashes_is_replaced(decoders: Decoders, file: Path) -> None:
    with pytest.raises(MediaError, match="damaged"):
        read_as_vllm_does(decoders, file.read_bytes())
    assert children() == []
    assert frames_of(opened(decoders, media.film("red", "blue"))) == 16


def test_an_idle_process_that_has_died_is_replaced(decoders: Decoders) -> None:
    decoders.prepare()
    (idle,) = children()
    idle.kill()
    idle.wait(timeout=10)
    assert frames_of(opened(decoders, media.film("red", "blue"))) == 16


def test_reading_an_aborted_capture_fails(decoders: Decoders) -> None:
    capture = opened(decoders, media.film("red", "blue"))
    capture.abort()
    with pytest.raises(MediaError):
        frames_of(capture)


def test_opening_a_video_can_be_aborted_while_the_process_hangs(decoders: Decoders) -> None:
    decoders.prepare()
    (process,) = children()
    capture = decoders.capture()
    process.suspend()
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(capture.open, media.film("red", "blue"))
        time.sleep(0.2)
        capture.abort()
        with pytest.raises(MediaError):
            opening.result(timeout=10)
    capture.close()


def test_read_returns_every_frame(decoders: Decoders) -> None:
    capture = opened(decoders, media.film("red", "blue"))
    count = 0
    while capture.read()[0]:
        count += 1
    capture.close()
    assert count == 16


def test_a_crashed_process_leaves_no_file_descriptor_open(decoders: Decoders) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(MediaError):
            read_as_vllm_does(decoders, (hostile.FOLDER / "crash.mp4").read_bytes())
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_process_has_no_secrets_and_ends_with_its_worker() -> None:
    program = """
        import sys, time
        from worker.settings import settings
        from worker.media.checks import Limits
        from worker.media.video import Decoders
        Decoders(Limits(settings.read({}))).prepare()
        print("ready", flush=True)
        time.sleep(60)
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
