"""One connection to the HTTP server: uvicorn's protocol, with limits on what a client may cost.

The worker bounds a request's head here, before it knows who sends it. `Gate` answers a connection that exceeds a limit
with the error in `scope["state"][REFUSED]`.
"""

import asyncio
import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from worker.errors import HeadTooLargeError, JobError, TooManyConnectionsError

REFUSED = "worker.refused"
"""The key in a scope's state for the error of a request that the protocol refuses."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of each connection, and of all connections of a server."""

    head_bytes: int = 65_536
    """The request line with all headers, or the trailers after a body."""
    headers: int = 200
    head_seconds: float = 20.0
    """From the connection's start, or the first byte of a later request, to the end of the headers."""
    send_seconds: float = 60.0
    """How long a client may leave the response unread."""
    discard_bytes: int = 64_000_000
    """How much of a body is read after its request was answered: many clients send everything before they read."""
    discard_seconds: float = 3.0
    pipelined: int = 16
    """Requests that wait on one connection behind the running one."""
    connections: int = 4096
    """At most half of the files that the process may open."""


LIMITS = Limits()


class Waiting:
    """The connections of a server without a complete request, those that wait longest first."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.for_head: dict[Protocol, None] = {}
        self.for_body: dict[Protocol, None] = {}

    def make_room(self, connections: set[Any]) -> bool:
        """Return whether the server may have one more connection. If need be, close one that waits."""
        most = self.limits.connections
        if 0 < (files := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < 2 * most:
            most = files // 2
        if len(connections) >= most and (oldest := next(iter(self.for_head or self.for_body), None)) is not None:
            self.remove(oldest)
            connections.discard(oldest)
            oldest.abort()
        return len(connections) < most

    def remove(self, connection: "Protocol") -> None:
        """Forget a connection."""
        self.for_head.pop(connection, None)
        self.for_body.pop(connection, None)


class Protocol(HttpToolsProtocol):
    """One connection. uvicorn creates it with its own arguments; `waiting` is shared by all of a server."""

    def __init__(self, *, waiting: Waiting, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._waiting = waiting
        self._limits = waiting.limits
        self._socket: asyncio.Transport = None  # type: ignore[assignment]
        self._running: RequestResponseCycle | None = None
        self._reading: Literal["nothing", "head", "body", "refused"] = "nothing"
        """The part of a request that is expected. Nothing more is parsed after a refused head."""
        self._pending = 0
        """Bytes received since the last complete head or the last part of a body."""
        self._discarded: int | None = None
        """Bytes received since the request was answered; None unless its body is still arriving."""
        self._closing = False
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def abort(self) -> None:
        """Close the connection at once. The app sees a disconnect."""
        self._socket.abort()

    # ---- The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin with the deadline of the first head; refuse the connection if there are too many."""
        has_room = self._waiting.make_room(self.connections)
        self._socket = transport
        super().connection_made(cast(asyncio.Transport, _Transport(transport, self._close, lambda: self._closing)))
        self._waiting.for_head[self] = None
        self._limit_reading(self._limits.head_seconds)
        if not has_room:
            self.on_message_begin()
            self._refuse(TooManyConnectionsError())

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers and report the disconnect to the app."""
        self._closing = True
        super().connection_lost(exc)
        self._waiting.remove(self)
        self._disconnect()
        self._stop_reading_limit()
        self._stop_writing_limit()

    def eof_received(self) -> None:
        """Close: the client has closed the connection, or at least its half."""
        self._reading = "nothing"
        self._close()

    def _close(self) -> None:
        """Close once the response is sent. A client that is still sending its request gets time to read it."""
        if self._closing:
            return
        self._closing = True
        self._disconnect()
        if self._reading in ("body", "refused"):
            # Closing a socket with unread data resets the connection, and the client may lose the response.
            self._discard()
            self._socket.write_eof()
            self.flow.resume_reading()
        else:
            self._socket.close()
            self._limit_writing()

    def _disconnect(self) -> None:
        """Report a disconnect to the app. uvicorn reports it to the last of pipelined requests only."""
        for cycle in (self._running, self.cycle):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def _refuse(self, error: JobError) -> None:
        """Answer with an error, without reading the request any further."""
        self.scope["state"][REFUSED] = error
        self.url = b"/"
        super().on_headers_complete()
        self.cycle.keep_alive = False
        self._reading = "refused"
        self._discard()

    # ---- Receiving

    def data_received(self, data: bytes) -> None:
        """Parse at most as many bytes at once as the head may still have."""
        if self._discarded is not None:
            self._discarded += len(data)
            if self._discarded > self._limits.discard_bytes:
                return self.abort()
        if self._read_timer is None and self in self._waiting.for_head:
            self._limit_reading(self._limits.head_seconds)
        while data and self._parses():
            room = self._limits.head_bytes - self._pending
            piece, data = data[:room], data[room:]
            self._pending += len(piece)
            super().data_received(piece)
            if self._pending >= self._limits.head_bytes and self._parses():
                self._end_head()
        return None

    def _parses(self) -> bool:
        return self._reading != "refused" and not self.transport.is_closing()

    def _end_head(self) -> None:
        """Refuse a head that is too long. Too many trailers, or line ends before a head, get no answer."""
        if self._reading == "head":
            self._refuse(HeadTooLargeError(self._limits.head_bytes, self._limits.headers))
        else:
            self.abort()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, or a head whose parsing `on_header` has stopped."""
        if self._reading == "head" and len(self.headers) > self._limits.headers:
            self._end_head()
        else:
            super().send_400_response(msg)

    def on_message_begin(self) -> None:
        """Expect a head."""
        self._reading = "head"
        self._unset_keepalive_if_required()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; stop parsing if there are too many. Drop trailers, which the app must not take for headers."""
        if self._reading == "head":
            super().on_header(name, value)
            if len(self.headers) > self._limits.headers:
                raise HeadTooLargeError(self._limits.head_bytes, self._limits.headers)

    def on_headers_complete(self) -> None:
        """Pass the request to the app, and expect its body."""
        self._reading, self._pending = "body", 0
        self._stop_reading_limit()
        if len(self.pipeline) >= self._limits.pipelined:
            return self.abort()
        if self in self._waiting.for_head:
            del self._waiting.for_head[self]
            self._waiting.for_body[self] = None
        return super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._pending = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Expect nothing, or the next request."""
        self._reading, self._pending = "nothing", 0
        self._waiting.for_body.pop(self, None)
        super().on_message_complete()
        if self._discarded is not None:
            self._discarded = None
            self._stop_reading_limit()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _discard(self) -> None:
        self._discarded = self._discarded or 0
        self._limit_reading(self._limits.discard_seconds)

    def _limit_reading(self, seconds: float) -> None:
        self._stop_reading_limit()
        self._read_timer = self.loop.call_later(seconds, self.abort)

    def _stop_reading_limit(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    # ---- Sending

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """Wait for the next request; if the body of this one is still arriving, read it and throw it away."""
        super().on_response_complete()
        if self._closing or not self.cycle.response_complete:
            return
        self._waiting.remove(self)
        self._waiting.for_head[self] = None
        if self._reading == "body":
            self._discard()
        elif self._reading == "head":
            self._limit_reading(self._limits.head_seconds)

    def pause_writing(self) -> None:
        """Begin to wait for a client that does not read."""
        super().pause_writing()
        self._limit_writing()

    def resume_writing(self) -> None:
        """Continue: the client has read."""
        super().resume_writing()
        if not self._closing:
            self._stop_writing_limit()

    def _limit_writing(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._limits.send_seconds, self.abort)

    def _stop_writing_limit(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


class _Transport:
    """A transport with another `close`."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None], is_closed: Callable[[], bool]) -> None:
        self._transport = transport
        self._is_closed = is_closed
        self.write = transport.write
        self.close = close

    def is_closing(self) -> bool:
        """Return whether `close` was called."""
        return self._is_closed() or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
