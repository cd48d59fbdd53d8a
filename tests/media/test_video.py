"""Videos in processes of their own, which may die."""

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
from worker.settings import settings as config

LIMITS = Limits.of(config.load({}))


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
    """Read a film to its end; return how many frames it has."""
    count = 0
    while capture.grab():
        found, frame = capture.retrieve()
        assert found
        assert frame is not None
        count += 1
    capture.close()
    return count


def children() -> list[psutil.Process]:
    return [one for one in psutil.Process().children() if "worker.media.decoder" in one.cmdline()]


def test_a_process_is_used_again(decoders: Decoders) -> None:
    film = media.film("red", "blue")
    assert [frames_of(opened(decoders, film)) for _ in range(3)] == [16] * 3
    assert len(children()) == 1


def test_several_at_once(decoders: Decoders) -> None:
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
def test_a_process_that_dies_is_replaced(decoders: Decoders, file: Path) -> None:
    with pytest.raises(MediaError, match="damaged"):
        read_as_vllm_does(decoders, file.read_bytes())
    assert children() == []
    assert frames_of(opened(decoders, media.film("red", "blue"))) == 16


def test_one_that_has_died_idle_is_replaced(decoders: Decoders) -> None:
    decoders.prepare()
    (idle,) = children()
    idle.kill()
    idle.wait(timeout=10)
    assert frames_of(opened(decoders, media.film("red", "blue"))) == 16


def test_one_that_is_aborted_fails_in_whichever_thread_waits_for_it(decoders: Decoders) -> None:
    capture = opened(decoders, media.film("red", "blue"))
    capture.abort()
    with pytest.raises(MediaError):
        frames_of(capture)


def test_one_that_hangs_while_it_opens_a_video_can_be_aborted(decoders: Decoders) -> None:
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


def test_frames_one_after_the_other(decoders: Decoders) -> None:
    capture = opened(decoders, media.film("red", "blue"))
    count = 0
    while capture.read()[0]:
        count += 1
    capture.close()
    assert count == 16


def test_nothing_stays_open_behind_one_that_died(decoders: Decoders) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(MediaError):
            read_as_vllm_does(decoders, (hostile.FOLDER / "crash.mp4").read_bytes())
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_it_holds_no_secret_and_ends_with_its_worker() -> None:
    program = """
        import sys, time
        from worker.settings import settings as config
        from worker.media.checks import Limits
        from worker.media.video import Decoders
        Decoders(Limits.of(config.load({}))).prepare()
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
