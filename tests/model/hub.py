"""A stand-in for the Hugging Face Hub, and functions that run programs against it."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from tests.support.tiny import ROOT

COMMIT = "a" * 40


@dataclass
class Hub:
    """The content of the stand-in, and the requests that it received."""

    port: int = 0
    error: tuple[int, str] | None = None
    """The status and the error code with which the stand-in answers every request."""
    files: dict[str, bytes] = field(default_factory=dict)
    """The files of every repository that is not in `repositories`."""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """The files of some repositories, by ORG/NAME."""
    requests: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """The time that one file takes."""

    def content(self, path: str) -> dict[str, bytes]:
        """Return the files of the repository that a request is about."""
        return next((files for name, files in self.repositories.items() if f"/{name}/" in f"{path}/"), self.files)


def handler_for(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.requests.append(self.path)
            files = hub.content(self.path)
            if hub.error or not files:
                status, code = hub.error or (404, "RepoNotFound")
                self._answer(status, b"", {"X-Error-Code": code})
            elif "/tree/" in self.path:
                tree = [{"type": "file", "path": name, "size": len(data), "oid": name} for name, data in files.items()]
                self._answer(200, json.dumps(tree).encode(), {})
            elif self.path.startswith("/api/"):
                siblings = [{"rfilename": name} for name in files]
                self._answer(200, json.dumps({"id": "org/model", "sha": COMMIT, "siblings": siblings}).encode(), {})
            else:
                data = files[self.path.split(f"/resolve/{COMMIT}/")[1]]
                if self.command == "GET":
                    time.sleep(hub.seconds)
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


RESOLVE = """
import sys
from worker.errors import StartupError
from worker.model.weights import Weights
from worker.settings import environment, read
weights = Weights(read(environment.read()))
try:
    print(*weights.folders().values(), sep="\\n")
except StartupError as error:
    print(error)
    sys.exit(error.exit_code)
finally:
    weights.close()
"""


def hub_environment(port: int, home: Path | None) -> dict[str, str]:
    """Return an environment in which the Hub's library uses the stand-in, and caches in `home` if that is given."""
    base = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    home_variable = {"HF_HOME": str(home)} if home else {}
    return {**base, "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_DISABLE_XET": "1", **home_variable}


def resolve(port: int, home: Path | None, **variables: str) -> tuple[int, str]:
    """Return an exit code, and the folders that the variables lead to, one a line, or the error."""
    done = run([sys.executable, "-c", RESOLVE], port, home, **variables)
    return done.returncode, done.stdout.strip()


def run(command: list[str], port: int, home: Path | None, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run a program in a process of its own, because huggingface_hub reads its endpoint at import."""
    environ = hub_environment(port, home) | variables
    return subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=False)
