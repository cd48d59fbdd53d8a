"""The examples, run with the embedded model as their docstrings show it."""

import json
import os
import re
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import API_KEY, Endpoint, HttpWorker
from tests.support import media, pdfs
from tests.support.links import Server
from tests.support.tiny import ROOT

GREETING = "Hello! How can I help you?"


def run(name: str, *arguments: object, code: int = 0, key: str = API_KEY) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "API_KEY": key, "RUNPOD_API_KEY": "any", "COLUMNS": "120"}
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


@pytest.fixture
def base_url(http_worker: HttpWorker) -> str:
    return f"{http_worker.url}/v1"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for colour in ("blue", "red"):
        (tmp_path / f"{colour}.png").write_bytes(media.picture(colour))
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


# ---- client.py


both_ways = pytest.mark.parametrize("flags", [(), ("--stream",)], ids=["not streaming", "streaming"])


@both_ways
def test_the_client_asks_a_server(base_url: str, pictures: Path, flags: tuple[str, ...]) -> None:
    assert run("client.py", "Hello", "--base-url", base_url, *flags).stdout == f"{GREETING}\n"
    result = run("client.py", "What is this?", "--base-url", base_url, "--image", pictures / "red.png", *flags)
    assert result.stdout == "The image is red.\n"


@both_ways
def test_the_client_asks_an_endpoint(endpoint: Endpoint, links: Server, tmp_path: Path, flags: tuple[str, ...]) -> None:
    target = ("--endpoint", "local", "--api", endpoint.server.base_url_v2, *flags)
    assert run("client.py", "Hello", *target).stdout == f"{GREETING}\n"
    film = tmp_path / "film.mp4"
    film.write_bytes(media.film("red", "blue"))
    files = ("--video", film, "--image", f"{links.url}/picture/green")
    assert run("client.py", "What do you see?", *files, *target).stdout == (
        "The image is green. The video goes from red to blue.\n"
    )
    assert "\nOnce upon a time" in "\n" + run("client.py", "Tell me a story", *target).stdout


@pytest.mark.parametrize("way", ["queue", "http"])
def test_the_client_asks_about_a_pdf(endpoint: Endpoint, base_url: str, tmp_path: Path, way: str) -> None:
    (tmp_path / "page.pdf").write_bytes(pdfs.of_colours("red"))
    queue = ("--endpoint", "local", "--api", endpoint.server.base_url_v2)
    target = queue if way == "queue" else ("--base-url", base_url)
    assert (
        run("client.py", "What is this?", "--document", tmp_path / "page.pdf", *target).stdout == "The image is red.\n"
    )


def test_the_client_follows_the_link_to_a_stored_result(links: Server) -> None:
    client = runpy.run_path(str(ROOT / "examples/client.py"))
    assert client["whole"]({"result_url": f"{links.url}/chat/hello"}) == {
        "messages": [{"role": "user", "content": "Hello"}]
    }
    assert client["whole"](["as it is"]) == ["as it is"]


def test_the_client_shows_the_status_of_a_job(endpoint: Endpoint) -> None:
    target = ("--endpoint", "local", "--api", endpoint.server.base_url_v2)
    assert "IN_PROGRESS" in run("client.py", "Tell me a story", *target).stderr


def test_the_client_reports_errors(endpoint: Endpoint, links: Server, base_url: str) -> None:
    target = ("--endpoint", "local", "--api", endpoint.server.base_url_v2)
    for flags in ((), ("--stream",)):
        failed_job = run("client.py", "?", "--image", f"{links.url}/status/404", *target, *flags, code=1)
        assert "error: The job ended with status FAILED: messages[0].content[0]" in failed_job.stderr
    wrong_api = run("client.py", "?", "--endpoint", "local", "--api", endpoint.server.url, code=1)
    assert "has no endpoint with this ID" in wrong_api.stderr
    wrong_file = run("client.py", "?", "--video", ROOT / "README.md", "--base-url", base_url, code=1)
    assert "README.md is not one of video files" in wrong_file.stderr
    assert "error: Error code: 401" in run("client.py", "?", "--base-url", base_url, key="wrong", code=1).stderr


# ---- smoke_test.py

CHECKS = ["health", "info", "models", "text", "streaming", "image", "image by URL", "video", "errors"]


def outcomes(table: str) -> dict[str, str]:
    rows: list[tuple[str, str]] = re.findall(r"^(\S.*?) +(ok|skipped|FAILED) +\d+\.\d\d s  ", table, re.MULTILINE)
    return dict(rows)


@pytest.mark.parametrize("mode", ["queue", "http"])
def test_the_smoke_test_passes(request: pytest.FixtureRequest, links: Server, mode: str) -> None:
    url = request.getfixturevalue("endpoint" if mode == "queue" else "http_worker").url
    table = run("smoke_test.py", url, "--image-url", f"{links.url}/picture/red").stdout
    assert outcomes(table) == dict.fromkeys(CHECKS, "ok")
    assert outcomes(run("smoke_test.py", url).stdout)["image by URL"] == "skipped"


def test_the_smoke_test_fails_with_a_wrong_key_or_link(http_worker: HttpWorker, links: Server) -> None:
    results = outcomes(run("smoke_test.py", http_worker.url, key="wrong", code=1).stdout)
    assert results.pop("health") == "ok"
    assert results.pop("image by URL") == "skipped"
    assert set(results.values()) == {"FAILED"}
    wrong_link = run("smoke_test.py", http_worker.url, "--image-url", f"{links.url}/status/404", code=1)
    assert outcomes(wrong_link.stdout) == dict.fromkeys(CHECKS, "ok") | {"image by URL": "FAILED"}


# ---- load_test.py


@pytest.mark.parametrize("load", [("--concurrency", 4), ("--rate", 10)], ids=["concurrency", "rate"])
def test_the_load_test_prints_and_plots_times(base_url: str, tmp_path: Path, load: tuple[object, ...]) -> None:
    plot = tmp_path / "load.svg"
    options = ("--duration", 2, "--max-tokens", 10, "--plot", plot)
    table = run("load_test.py", "--base-url", base_url, *load, *options).stdout
    answers = re.match(r"(\d+) answers and 0 errors in ", table)
    assert answers is not None
    assert int(answers[1]) > 4
    assert re.search(r"^[\d.]+ requests/s, [\d.]+ tokens/s$", table, re.MULTILINE)
    figures = {line[:20].strip(): [float(value) for value in line[20:].split()] for line in table.splitlines()[3:]}
    assert all(values == sorted(values) and len(values) == 5 for values in figures.values())
    assert 0 < figures["first token"][0] < figures["total"][0]
    assert "<svg" in plot.read_text()


def test_the_load_test_counts_errors(endpoint: Endpoint) -> None:
    unknown_model = ("--base-url", endpoint.server.openai_base_url, "--model", "gpt-9")
    result = run("load_test.py", *unknown_model, "--concurrency", 2, "--duration", 0.2, code=1)
    assert "0 answers and " in result.stdout
    assert "The model `gpt-9` does not exist" in result.stderr


# ---- caption_images.py


def captions(folder: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert len(lines) == len({line["file"] for line in lines})
    return {line["file"]: line["caption"] for line in lines}


@pytest.mark.parametrize("mode", ["queue", "http"])
def test_every_image_gets_a_caption(endpoint: Endpoint, base_url: str, pictures: Path, mode: str) -> None:
    run("caption_images.py", pictures, "--base-url", endpoint.server.openai_base_url if mode == "queue" else base_url)
    assert captions(pictures) == {"blue.png": "The image is blue.", "red.png": "The image is red."}


def test_a_second_run_captions_the_remaining_images(base_url: str, pictures: Path) -> None:
    (pictures / "captions.jsonl").write_text('{"file": "blue.png", "caption": "Kept."}\n{"file": "red.p')
    (pictures / "more").mkdir()
    broken = pictures / "more/broken.png"
    broken.write_bytes(b"not an image")
    first = run("caption_images.py", pictures, "--base-url", base_url, code=1)
    assert "images: 1 have a caption, 2 do not" in first.stderr
    assert "more/broken.png: Error code: 400" in first.stderr
    assert captions(pictures) == {"blue.png": "Kept.", "red.png": "The image is red."}
    broken.write_bytes(media.picture("green"))
    assert "images: 2 have a caption, 1 do not" in run("caption_images.py", pictures, "--base-url", base_url).stderr
    assert captions(pictures)["more/broken.png"] == "The image is green."


# ---- conversation.py


class Balancer(ThreadingHTTPServer):
    """Answers as RunPod's load balancer with one worker. It records the affinity and the messages of each request."""

    daemon_threads = True
    worker = "worker-7"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Balanced)
        self.affinities: list[str | None] = []
        self.messages: list[list[str]] = []


class Balanced(BaseHTTPRequestHandler):
    server: Balancer

    def do_GET(self) -> None:
        self._answer({"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.affinities.append(self.headers["x-runpod-worker-id"])
        self.server.messages.append([message["content"] for message in body["messages"]])
        self._answer({"choices": [{"message": {"role": "assistant", "content": f"answer {len(body['messages'])}"}}]})

    def _answer(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.send_header("x-runpod-worker-id", self.server.worker)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Do not log."""


@pytest.fixture
def balancer() -> Iterator[Balancer]:
    with Balancer() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    ("affinity", "sent"),
    [
        pytest.param("soft", "worker-7", id="another worker may answer"),
        pytest.param("strict", "strict worker-7", id="only the same worker may answer"),
        pytest.param("strict-resume", "strict-resume worker-7", id="the same worker is resumed if it was stopped"),
    ],
)
def test_a_conversation_stays_with_its_worker(balancer: Balancer, affinity: str, sent: str) -> None:
    url = f"http://127.0.0.1:{balancer.server_port}/v1"
    result = run("conversation.py", "one", "two", "three", "--base-url", url, "--affinity", affinity)
    assert result.stdout == "worker-7: answer 1\nworker-7: answer 3\nworker-7: answer 5\n"
    assert balancer.affinities == [None, sent, sent]
    assert balancer.messages[-1] == ["one", "answer 1", "two", "answer 3", "three"]


def test_a_conversation_works_without_a_load_balancer(base_url: str) -> None:
    assert run("conversation.py", "Hello", "Hello", "--base-url", base_url).stdout.startswith(f"{GREETING}\n")
