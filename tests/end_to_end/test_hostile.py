"""Hostile requests to a running worker: each is answered with an error, and nobody else notices it.

Meanwhile a `Watch` calls `/ping`, asks about honest images and measures the worker's memory. Its limits hold on a
machine that does nothing else.
"""

import re
import select
import socket
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import HttpWorker, run_http_worker
from tests.support import hostile, hostile_bodies, hostile_clips, hostile_images, hostile_tiffs, media
from tests.support.attack import (
    SECONDS,
    SILENT_RESOLVER,
    CountingServer,
    answer_on,
    gives_a_reason,
    is_closed,
    names_the_part,
    post_all,
    wait_for,
    wrong_answers,
)
from tests.support.hostile import SESSION
from tests.support.hostile_bodies import CHAT, Body, chat_about
from tests.support.hostile_images import File
from tests.support.links import Server
from tests.support.watch import SLOWNESS, Watch

SETTINGS = {
    "MAX_TOTAL_REQUEST_BYTES": "600000000",
    "LIMIT_MM_PER_PROMPT": '{"image": 128, "video": 2}',
    "MEDIA_ALLOW_PRIVATE_NETWORKS": "true",
    "MEDIA_FETCH_TIMEOUT": "5",
    "MEDIA_DECODE_TIMEOUT": "5",
    "IMAGE_DECODE_TIMEOUT": "2",
}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpWorker]:
    """A worker with limits that suit a small machine."""
    folder = tmp_path_factory.mktemp("hostile")
    source, library = folder / "resolver.c", folder / "resolver.so"
    source.write_text(SILENT_RESOLVER)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    with run_http_worker(folder, LD_PRELOAD=str(library), **SETTINGS) as worker:
        # On a CPU the engine stops for seconds to compile the code for these options when they are first used.
        options = {"frequency_penalty": 0.5, "min_p": 0.1, "logprobs": True, "top_logprobs": 2, "logit_bias": {"9": 1}}
        (answer,) = post_all(worker, [Body("options", hostile_bodies.chat(**options))], 1)
        print(f"The first request with options took {answer.seconds:.1f} s")
        assert answer.status == 200
        yield worker


@pytest.fixture
def links() -> Iterator[CountingServer]:
    with CountingServer() as server:
        yield server


@pytest.fixture
def watch(worker: HttpWorker, links: CountingServer) -> Iterator[Watch]:
    watch = Watch(worker, links)
    yield watch
    print(watch)


def url_of(data: bytes) -> str:
    return f"data:;base64,{media.encoded(data)}"


# ---- The rows of issue 16


@dataclass(frozen=True)
class Row:
    """Requests that are sent at once, and their answer."""

    contents: Callable[[Server], Iterable[bytes]]
    statuses: set[int]
    words: str
    """A regular expression for the error's message."""
    seconds: float = SECONDS
    log_bytes: int = 100_000


def about_images(*files: bytes) -> Callable[[Server], Iterable[bytes]]:
    return lambda _links: [chat_about("image", url_of(data)) for data in files]


def palette_pictures(_links: Server) -> Iterable[bytes]:
    return [chat_about("image", *[url_of(hostile_images.palette_png(number=number)) for number in range(8)])]


def endless_links(links: Server) -> Iterable[bytes]:
    return [chat_about("image", *[f"{links.url}/endless/?{number}" for number in range(60)])]


def silent_links(_links: Server) -> Iterable[bytes]:
    return [chat_about("image", *[f"http://host-{number}.silent.test/" for number in range(30)])]


IMAGE = r"messages\[0\]\.content\[\d+\], an image: "
TIMED_OUT, TOO_LARGE, BUSY = 504, 413, 429
ROWS = {
    "120,000 wrong messages": lambda: Row(
        lambda _: [hostile_bodies.wrong_messages()], {400}, "messages|values|objects", seconds=5
    ),
    "100 bad image parts": lambda: Row(lambda _: [hostile_bodies.bad_images()], {400}, IMAGE, seconds=5),
    "a JPEG with 1,000 refinement scans, and 4 with 300": lambda: Row(
        about_images(
            hostile_images.progressive_jpeg(),
            *[hostile_images.progressive_jpeg(scans=scans) for scans in (300, 301, 302, 303)],
        ),
        {400, TOO_LARGE},
        f"{IMAGE}.*(IMAGE_DECODE_TIMEOUT|scans)",
    ),
    "a JPEG with 4.5 million empty segments": lambda: Row(
        about_images(hostile_images.jpeg_of_empty_segments()), {400, TOO_LARGE}, IMAGE, seconds=10
    ),
    "a TIFF of 64 x 64 with a tile of 2 GP": lambda: Row(
        about_images(hostile_tiffs.tiled_tiff(64, 64, (65_520, 32_752), 8)), {400, TOO_LARGE}, IMAGE
    ),
    "an AVIF that claims 64 x 64 and has 121 MP": lambda: Row(
        about_images(hostile_tiffs.avif_that_claims(64, 64)), {400, TOO_LARGE}, IMAGE
    ),
    "8 palette PNGs of 64 MP": lambda: Row(palette_pictures, {200, TOO_LARGE, BUSY}, ""),
    "60 links to one host": lambda: Row(
        endless_links, {TOO_LARGE, BUSY}, f"{IMAGE}.*(MAX_IMAGE_BYTES|MAX_TOTAL_REQUEST_BYTES)"
    ),
    "30 links whose name server is silent": lambda: Row(
        silent_links, {424, TIMED_OUT}, f"{IMAGE}the link", seconds=30
    ),
    "an MP4 with 20 million frames": lambda: Row(
        lambda _: [chat_about("video", url_of(hostile_clips.mp4_of_20_million_frames()))],
        {400, TOO_LARGE},
        r"messages\[0\]\.content\[0\], a video: .*frames",
    ),
    "a TIFF with 65,000 warnings": lambda: Row(
        about_images(hostile_tiffs.tiff_with_warnings()), {200, 400, TOO_LARGE}, "", log_bytes=10_000
    ),
}  # fmt: skip


long = pytest.mark.skipif(SLOWNESS > 1, reason="`make hostile` runs it; tests/http and tests/media have short ones")


@pytest.mark.parametrize("name", [pytest.param(name, marks=long if "silent" in name else ()) for name in ROWS])
def test_one_hostile_request(worker: HttpWorker, links: CountingServer, watch: Watch, name: str) -> None:
    row = ROWS[name]()
    bodies = [Body(name, content) for content in row.contents(links)]
    with watch.running():
        answers = post_all(worker, bodies, len(bodies))
    for answer in answers:
        print(f"{answer.status} after {answer.seconds:.1f} s: {answer.text[:300]}")
    print(f"{links.most_open} connections")
    for answer in answers:
        assert answer.status in row.statuses
        assert re.search(row.words, answer.text)
        assert answer.seconds < row.seconds
    assert watch.log_growth < row.log_bytes
    assert links.most_open <= 16
    watch.check()


def test_30_mb_of_headers_are_refused(worker: HttpWorker, watch: Watch) -> None:
    with watch.running(), socket.create_connection(("127.0.0.1", worker.port)) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n")
        sent = 0
        with suppress(ConnectionError):
            while sent < 30_000_000 and not select.select([connection], [], [], 0.001)[0]:
                sent += connection.send(f"x-{sent}: {'a' * 1000}\r\n".encode())
        answer = answer_on(connection)
        print(f"{sent} bytes sent, answered with {answer}")
        assert sent < 1_000_000
        assert answer.startswith("HTTP/1.1 431 ")
        wait_for(lambda: is_closed(connection))
    watch.check()


@long
def test_200_idle_connections_are_closed(worker: HttpWorker, watch: Watch) -> None:
    starts = (b"", b"GET /v1/models HTTP/1.1\r\nhost: x\r\n", f"POST {CHAT} HTTP/1.1\r\nhost".encode(), b"\r\n")
    with ExitStack() as stack, watch.running():
        connections = {stack.enter_context(socket.create_connection(("127.0.0.1", worker.port))) for _ in range(200)}
        for number, connection in enumerate(connections):
            connection.sendall(starts[number % len(starts)])

        def are_closed() -> bool:
            connections.difference_update([*filter(is_closed, connections)])
            return not connections

        wait_for(are_closed, seconds=40)
    watch.check()


def test_a_session_description_is_not_transcribed(worker: HttpWorker, watch: Watch) -> None:
    """The embedded model takes no sounds, so the route does not exist. tests/engine tests its checks."""
    files = {"file": ("a.wav", SESSION.ljust(88, b"\n"))}
    with watch.running(), worker.client() as client:
        answer = client.post("/v1/audio/transcriptions", files=files, data={"model": "tiny"})
    assert answer.status_code == 404
    watch.check()


# ---- Other files


def hostile_files() -> dict[str, Callable[[], Iterable[tuple[str, File]]]]:
    """Return batches of files, each with the kind of part that they are sent as."""

    def batch(kind: str, files: Callable[[], Iterable[File]]) -> Callable[[], Iterable[tuple[str, File]]]:
        return lambda: [(kind, file) for file in files()]

    return {
        "images": batch("image", lambda: [File(*file) for file in hostile.images()]),
        "videos": batch("video", lambda: [File(*file) for file in hostile.videos()]),
        "JPEGs": batch("image", hostile_images.jpegs),
        "PNGs": batch("image", hostile_images.pngs),
        "TIFFs": batch("image", hostile_tiffs.tiffs),
        "AVIFs": batch("image", hostile_tiffs.avifs),
        "animations": batch("image", hostile_images.animations),
        "bitmaps": batch("image", hostile_images.bitmaps),
        "clips": batch("video", hostile_clips.clips),
        "sounds as videos": batch("video", hostile_clips.recordings),
        "sounds": batch("audio", hostile_clips.recordings),
        "frame lists": batch("frames", frame_lists),
    }


def frame_lists() -> Iterator[File]:
    for name, text in hostile.frames():
        yield File(name, text.encode())
    yield from hostile_clips.frame_lists()


def body_about(kind: str, file: File) -> Body:
    if kind == "frames":
        return Body(file.name, chat_about("video", f"data:video/jpeg;base64,{file.data.decode()}"), file.may_pass)
    return Body(file.name, chat_about(kind, url_of(file.data)), file.may_pass)


@long
@pytest.mark.parametrize("batch", hostile_files())
def test_hostile_files(worker: HttpWorker, watch: Watch, batch: str) -> None:
    bodies = [body_about(kind, file) for kind, file in hostile_files()[batch]()]
    with watch.running():
        answers = post_all(worker, bodies, 4)
    wrong = wrong_answers(bodies, answers, names_the_part)
    assert not wrong
    assert watch.log_growth < 1_000_000
    watch.check()


# ---- Other bodies


@pytest.mark.parametrize("batch", ["shapes", "numbers", pytest.param("fields", marks=long), "forms", "templates"])
def test_hostile_bodies(worker: HttpWorker, watch: Watch, batch: str) -> None:
    bodies = list(getattr(hostile_bodies, batch)())
    with watch.running():
        answers = post_all(worker, bodies, 4)
    wrong = wrong_answers(bodies, answers, gives_a_reason)
    assert not wrong
    assert watch.log_growth < 1_000_000
    watch.check()


HEAD = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nauthorization: Bearer KEY\r\n"
CHUNKED = HEAD + "transfer-encoding: chunked\r\n\r\n"
RAW: dict[str, tuple[str, set[int]]] = {
    "a chunk that lies about its size": (CHUNKED + "3\r\n{}aaaa\r\n0\r\n\r\n", {400}),
    "a chunk of a negative size": (CHUNKED + "-5\r\n{}\r\n0\r\n\r\n", {400}),
    "a chunk of 2⁶⁴ bytes": (CHUNKED + "fffffffffffffffff\r\n{}\r\n", {400}),
    "two lengths": (HEAD + "content-length: 2\r\ncontent-length: 30\r\n\r\n{}", {400}),
    "a negative length": (HEAD + "content-length: -1\r\n\r\n{}", {400}),
    "a length of 10³⁰ bytes": (HEAD + f"content-length: {10**30}\r\n\r\n{{}}", {400}),
    "a length of 10 GB": (HEAD + f"content-length: {10**10}\r\n\r\n{{}}", {413}),
    "a length and chunks": (CHUNKED.replace(" HTTP/1.1", " HTTP/1.1\r\ncontent-length: 5", 1) + "2\r\n{}\r\n", {400}),
    "a line break in a header": (HEAD + "x: a\rb\r\n\r\n", {400}),
    "no HTTP": ("\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n", {400}),
    "an unknown method": ("BREW / HTTP/1.1\r\nhost: x\r\n\r\n", {400}),
    "a path of 100 kB": (f"GET /{'a' * 100_000} HTTP/1.1\r\nhost: x\r\n\r\n", {431}),
    "1,000 headers": (HEAD + "".join(f"x-{number}: a\r\n" for number in range(1000)) + "\r\n", {431}),
    "100 kB of trailers": (f"{CHUNKED}2\r\n{{}}\r\n0\r\nx: {'a' * 100_000}\r\n\r\n", {400, 431}),
}  # fmt: skip


@pytest.mark.parametrize("name", RAW)
def test_malformed_http(worker: HttpWorker, name: str) -> None:
    text, statuses = RAW[name]
    with socket.create_connection(("127.0.0.1", worker.port)) as connection:
        connection.sendall(text.replace("KEY", worker.key).encode("latin-1"))
        answer = answer_on(connection)
    assert answer.startswith(tuple(f"HTTP/1.1 {status} " for status in statuses))
    assert worker.ping() == 200


def test_a_body_that_does_not_arrive_completely_has_no_effect(worker: HttpWorker, watch: Watch) -> None:
    with watch.running(), ExitStack() as stack:
        for _ in range(50):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", worker.port)))
            head = HEAD.replace("KEY", worker.key) + "content-length: 29000000\r\n\r\n"
            connection.sendall(head.encode() + bytes(5_000_000))
    watch.check()


# ---- Last, because the engine may be busy for long if one of these reaches it


def test_constraints_of_the_answer_that_take_long_to_compile(worker: HttpWorker, watch: Watch) -> None:
    bodies = list(hostile_bodies.grammars())
    with watch.running():
        answers = post_all(worker, bodies, 2)
    wrong = wrong_answers(bodies, answers, gives_a_reason)
    assert not wrong
    assert max(answer.seconds for answer in answers) < 35 * SLOWNESS
    watch.check()


def test_the_log_has_no_traceback_and_no_key(worker: HttpWorker) -> None:
    log = Path(worker.log).read_text()
    assert worker.key not in log
    assert "Traceback" not in log
