"""An HTTP server for media links: images, videos, and the ways in which a server can misbehave."""

import json
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler

from tests.support import media, pdfs, speech
from tests.support.local_server import LocalServer


class Server(LocalServer):
    """Records the path of every request and the headers of the last one."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        super().__init__(Handler, address)
        self.hits: list[str] = []
        self.headers: dict[str, str] = {}
        self.connections = 0
        self.most_connections = 0
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    """The first segment of the path, such as `/slow/0.5`, selects the behaviour and the rest is its argument."""

    server: Server

    def do_GET(self) -> None:
        self.server.hits.append(self.path)
        self.server.headers = {name.lower(): value for name, value in self.headers.items()}
        behaviour, _, argument = self.path.partition("?")[0][1:].partition("/")
        match behaviour:
            case "picture":
                self._answer(200, media.picture(argument))
            case "document":
                self._answer(200, pdfs.of_colours(*argument.split("-")))
            case "film":
                first, _, last = argument.partition("-")
                self._answer(200, media.film(first, last))
            case "speech":
                keys, _, language = argument.partition("-")
                self._answer(200, speech.wav(keys.replace("_", " "), language))
            case "chat":
                chat = {"messages": [{"role": "user", "content": argument.capitalize()}]}
                self._answer(200, json.dumps(chat).encode())
            case "status":
                self._answer(int(argument))
            case "redirect":
                self._answer(302, location=argument)
            case "loop":
                self._answer(301, location=self.path)
            case "slow":
                time.sleep(float(argument))
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

    def do_PUT(self) -> None:
        self.server.hits.append(self.path)
        self.rfile.read(int(self.headers["content-length"]))
        self._answer(200)

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"content-length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Do not log."""

    def handle(self) -> None:
        server = self.server
        with server.lock:
            server.connections += 1
            server.most_connections = max(server.most_connections, server.connections)
        try:
            super().handle()
        except OSError:
            """The client closed the connection."""
        finally:
            with server.lock:
                server.connections -= 1
