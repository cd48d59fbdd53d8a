"""A server behind links: pictures, films, and everything that a server may do to whoever fetches from it."""

import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

from tests.support import media


class Server(ThreadingHTTPServer):
    """Answers by path and remembers every request."""

    daemon_threads = True

    def __init__(self, address: str = "127.0.0.1") -> None:
        super().__init__((address, 0), Handler)
        self.hits: list[str] = []
        self.headers: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.hits.append(self.path)
        self.server.headers = {name.lower(): value for name, value in self.headers.items()}
        kind, _, rest = self.path.partition("?")[0][1:].partition("/")
        match kind:
            case "picture":
                self._answer(200, media.picture(rest))
            case "film":
                first, _, last = rest.partition("-")
                self._answer(200, media.film(first, last))
            case "status":
                self._answer(int(rest))
            case "redirect":
                self._answer(302, location=rest)
            case "loop":
                self._answer(301, location=self.path)
            case "slow":
                time.sleep(float(rest))
                self._answer(200, media.picture("red"))
            case "drip":
                self.send_response(200)
                self.end_headers()
                for _ in range(600):
                    time.sleep(0.05)
                    self.wfile.write(b"x")
                    self.wfile.flush()
            case "endless":
                self.send_response(200)
                self.end_headers()
                while True:
                    self.wfile.write(b"x" * 65536)
            case "packed":
                self._answer(200, zlib.compress(b"\0" * 10_000_000), **{"content-encoding": "deflate"})
            case "broken":
                self._answer(200, b"short", **{"content-length": "1000"})
            case _:
                self._answer(200, b"hello")

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"content-length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            """The client has left."""
