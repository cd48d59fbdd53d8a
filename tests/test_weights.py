"""Which folder a MODEL_NAME becomes, against a stand-in for the Hugging Face Hub."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.tiny import ROOT
from worker import config, weights
from worker.errors import ConfigurationError

COMMIT = "a" * 40


@dataclass
class Hub:
    """What the stand-in holds and has been asked."""

    port: int = 0
    refusal: tuple[int, str] | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


def handler_for(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.requests.append(self.path)
            if hub.refusal:
                self._answer(hub.refusal[0], b"", {"X-Error-Code": hub.refusal[1]})
            elif "/tree/" in self.path:
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": name} for name, data in hub.files.items()
                ]
                self._answer(200, json.dumps(tree).encode(), {})
            elif self.path.startswith("/api/"):
                siblings = [{"rfilename": name} for name in hub.files]
                self._answer(200, json.dumps({"id": "org/model", "sha": COMMIT, "siblings": siblings}).encode(), {})
            else:
                data = hub.files[self.path.rpartition("/")[2]]
                self._answer(200, data, {"ETag": f'"{hash(data)}"', "X-Repo-Commit": COMMIT})

        do_HEAD = do_GET

        def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            pass

    return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler_for(hub)) as server:
        hub.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()


RESOLVE = """
import os, sys
from tests.tiny import ROOT
from worker import config, weights
from worker.errors import StartupError
try:
    print(weights.resolve(config.load(os.environ)))
except StartupError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def resolve(port: int, cache: Path, **environ: str) -> tuple[int, str]:
    """Resolve in a process of its own, because huggingface_hub reads its endpoint at import."""
    base = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", RESOLVE]
    done = subprocess.run(
        command, env={**base, **hub, **environ}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout.strip()


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert weights.resolve(config.load({"MODEL_NAME": str(tmp_path)})) == tmp_path


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "~/model", "a/b/c"])
def test_a_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"MODEL_NAME='{name}': no such folder"):
        weights.resolve(config.load({"MODEL_NAME": name}))


@pytest.mark.parametrize("name", ["my model", "org/"])
def test_a_name_that_is_no_id(name: str) -> None:
    with pytest.raises(ConfigurationError, match="neither a folder nor a Hugging Face id"):
        weights.resolve(config.load({"MODEL_NAME": name}))


def test_a_model_is_downloaded_once_and_without_what_vllm_never_reads(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"config.json": b"{}", "model.safetensors": b"weights", "flax_model.msgpack": b"other weights"}
    code, folder = resolve(hub.port, tmp_path, MODEL_NAME="org/model")
    assert code == 0
    assert {file.name for file in Path(folder).iterdir()} == {"config.json", "model.safetensors"}
    assert Path(folder).name == COMMIT


@pytest.mark.parametrize(
    ("status", "reason", "message"),
    [
        pytest.param(401, "RepoNotFound", "has no such model, or it is private", id="unknown"),
        pytest.param(403, "GatedRepo", "is gated: ask for access at https://huggingface.co/org/model", id="gated"),
        pytest.param(404, "RevisionNotFound", "MODEL_REVISION='v9': org/model has no such", id="revision"),
    ],
)
def test_what_no_retry_mends_ends_with_2(hub: Hub, tmp_path: Path, status: int, reason: str, message: str) -> None:
    hub.refusal = (status, reason)
    code, told = resolve(hub.port, tmp_path, MODEL_NAME="org/model", MODEL_REVISION="v9", HF_TOKEN="hf_secret")
    assert (code, len(told.splitlines())) == (2, 1)
    assert message in told
    assert "hf_secret" not in told


def test_a_hub_that_is_away_ends_with_1(tmp_path: Path) -> None:
    code, told = resolve(1, tmp_path, MODEL_NAME="org/model")
    assert (code, len(told.splitlines())) == (1, 1)
    assert "could not be fetched from the Hugging Face Hub" in told
