"""The examples, run as their docstrings show them, with the embedded model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import API_KEY, Endpoint, HttpWorker
from tests.support import media
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
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


# ---- client.py


@pytest.mark.parametrize("how", [(), ("--stream",)])
def test_the_client_asks_a_server(base_url: str, pictures: Path, how: tuple[str, ...]) -> None:
    assert run("client.py", "Hello", "--base-url", base_url, *how).stdout == f"{GREETING}\n"
    asked = run("client.py", "What is this?", "--base-url", base_url, "--image", pictures / "red.png", *how)
    assert asked.stdout == "The image is red.\n"


@pytest.mark.parametrize("how", [(), ("--stream",)])
def test_the_client_asks_an_endpoint(endpoint: Endpoint, links: Server, tmp_path: Path, how: tuple[str, ...]) -> None:
    at = ("--endpoint", "local", "--api", endpoint.server.base_url_v2, *how)
    assert run("client.py", "Hello", *at).stdout == f"{GREETING}\n"
    film = tmp_path / "film.mp4"
    film.write_bytes(media.film("red", "blue"))
    files = ("--video", film, "--image", f"{links.url}/picture/green")
    assert run("client.py", "What do you see?", *files, *at).stdout == (
        "The image is green. The video goes from red to blue.\n"
    )
    assert "\nOnce upon a time" in "\n" + run("client.py", "Tell me a story", *at).stdout


def test_the_client_shows_a_jobs_status(endpoint: Endpoint) -> None:
    at = ("--endpoint", "local", "--api", endpoint.server.base_url_v2)
    assert "IN_PROGRESS" in run("client.py", "Tell me a story", *at).stderr


def test_the_client_tells_what_is_wrong(endpoint: Endpoint, links: Server, base_url: str) -> None:
    at = ("--endpoint", "local", "--api", endpoint.server.base_url_v2)
    for how in ((), ("--stream",)):
        failed = run("client.py", "?", "--image", f"{links.url}/status/404", *at, *how, code=1)
        assert "error: The job is FAILED: messages[0].content[0]" in failed.stderr
    nowhere = run("client.py", "?", "--endpoint", "local", "--api", endpoint.server.url, code=1)
    assert "knows no such endpoint" in nowhere.stderr
    no_film = run("client.py", "?", "--video", ROOT / "README.md", "--base-url", base_url, code=1)
    assert "does not look like the file of a video" in no_film.stderr
    assert "error: Error code: 401" in run("client.py", "?", "--base-url", base_url, key="wrong", code=1).stderr


# ---- smoke_test.py

CHECKS = ["health", "info", "models", "text", "streaming", "image", "image by URL", "video", "errors"]


def outcomes(table: str) -> dict[str, str]:
    found: list[tuple[str, str]] = re.findall(r"^(\S.*?) +(ok|skipped|FAILED) +\d+\.\d\d s  ", table, re.MULTILINE)
    return dict(found)


@pytest.mark.parametrize("way", ["queue", "http"])
def test_the_smoke_test(request: pytest.FixtureRequest, links: Server, way: str) -> None:
    url = request.getfixturevalue("endpoint" if way == "queue" else "http_worker").url
    table = run("smoke_test.py", url, "--image-url", f"{links.url}/picture/red").stdout
    assert outcomes(table) == dict.fromkeys(CHECKS, "ok")
    assert outcomes(run("smoke_test.py", url).stdout)["image by URL"] == "skipped"


def test_the_smoke_test_fails(http_worker: HttpWorker, links: Server) -> None:
    seen = outcomes(run("smoke_test.py", http_worker.url, key="wrong", code=1).stdout)
    assert seen.pop("health") == "ok"
    assert seen.pop("image by URL") == "skipped"
    assert set(seen.values()) == {"FAILED"}
    unseen = run("smoke_test.py", http_worker.url, "--image-url", f"{links.url}/status/404", code=1)
    assert outcomes(unseen.stdout) == dict.fromkeys(CHECKS, "ok") | {"image by URL": "FAILED"}


# ---- load_test.py


@pytest.mark.parametrize("how", [("--concurrency", 4), ("--rate", 10)])
def test_the_load_test(base_url: str, tmp_path: Path, how: tuple[object, ...]) -> None:
    plot = tmp_path / "load.svg"
    options = ("--duration", 2, "--max-tokens", 10, "--plot", plot)
    table = run("load_test.py", "--base-url", base_url, *how, *options).stdout
    answers = re.match(r"(\d+) answers and 0 errors in ", table)
    assert answers is not None
    assert int(answers[1]) > 4
    assert re.search(r"^[\d.]+ requests/s, [\d.]+ tokens/s$", table, re.MULTILINE)
    figures = {line[:20].strip(): [float(value) for value in line[20:].split()] for line in table.splitlines()[3:]}
    assert all(values == sorted(values) and len(values) == 5 for values in figures.values())
    assert 0 < figures["first token"][0] < figures["total"][0]
    assert "<svg" in plot.read_text()


def test_the_load_test_counts_errors(endpoint: Endpoint) -> None:
    at = ("--base-url", endpoint.server.openai_base_url, "--model", "gpt-9")
    failed = run("load_test.py", *at, "--concurrency", 2, "--duration", 0.2, code=1)
    assert "0 answers and " in failed.stdout
    assert "The model `gpt-9` does not exist" in failed.stderr


# ---- caption_images.py


def captions(folder: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert len(lines) == len({line["file"] for line in lines})
    return {line["file"]: line["caption"] for line in lines}


@pytest.mark.parametrize("way", ["queue", "http"])
def test_captions(endpoint: Endpoint, base_url: str, pictures: Path, way: str) -> None:
    run("caption_images.py", pictures, "--base-url", endpoint.server.openai_base_url if way == "queue" else base_url)
    assert captions(pictures) == {"blue.png": "The image is blue.", "red.png": "The image is red."}


def test_captions_go_on_where_they_stopped(base_url: str, pictures: Path) -> None:
    (pictures / "captions.jsonl").write_text('{"file": "blue.png", "caption": "Mine."}\n{"file": "red.p')
    (pictures / "more").mkdir()
    broken = pictures / "more/broken.png"
    broken.write_bytes(b"no picture")
    first = run("caption_images.py", pictures, "--base-url", base_url, code=1)
    assert "captions: 1 are there, 2 to come" in first.stderr
    assert "more/broken.png: Error code: 400" in first.stderr
    assert captions(pictures) == {"blue.png": "Mine.", "red.png": "The image is red."}
    broken.write_bytes(media.picture("green"))
    assert "captions: 2 are there, 1 to come" in run("caption_images.py", pictures, "--base-url", base_url).stderr
    assert captions(pictures)["more/broken.png"] == "The image is green."
