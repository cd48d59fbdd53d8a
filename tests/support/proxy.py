"""A TCP proxy in front of a server on this machine, whose connections can die without a sign."""

import asyncio
import socket
import struct
import threading
from contextlib import suppress
from typing import Self

import uvloop

from worker import race

CHUNK_BYTES = 1 << 18
RESET = "reset"


class Proxy:
    """Forwards connections to a port within a `with` block, from a thread of its own."""

    def __init__(self, target: int) -> None:
        self.opened = 0
        """How many connections were opened so far."""
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.port: int = self._listener.getsockname()[1]
        self._lost: dict[asyncio.StreamWriter, asyncio.Event] = {}
        """For each open connection, whether it is lost. The key is its side that leads to the server."""
        self._loop = uvloop.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    def lose_connections(self) -> None:
        """Let all open connections die: the server sees their end, and the client sees nothing. New ones work."""

        async def lose() -> None:
            for lost in self._lost.values():
                lost.set()

        asyncio.run_coroutine_threadsafe(lose(), self._loop).result()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._forward, sock=self._listener)
        await self._stop.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _forward(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        self.opened += 1
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._target)
        lost = self._lost[to_server] = asyncio.Event()
        asking = asyncio.create_task(_copy(from_client, to_server))
        answering = asyncio.create_task(_copy(from_server, to_client))
        try:
            ended = await race.first(lost.wait(), asking, answering)
            await race.end(asking, answering)
            if lost.is_set():
                to_server.transport.abort()
                # What is sent on a lost connection arrives nowhere.
                with suppress(ConnectionError):
                    while await from_client.read(CHUNK_BYTES):
                        pass
            elif ended.result() is RESET:
                _reset(to_client if ended is answering else to_server)
        except asyncio.CancelledError:
            # The proxy ends. asyncio's server would log a task that was cancelled.
            pass
        finally:
            del self._lost[to_server]
            await race.end(asking, answering)
            to_client.close()
            to_server.close()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> str | None:
    """Copy to the end, and return whether the connection was reset."""
    try:
        while data := await source.read(CHUNK_BYTES):
            target.write(data)
            await target.drain()
    except ConnectionError:
        return RESET
    return None


def _reset(side: asyncio.StreamWriter) -> None:
    # With a linger time of 0, the kernel sends RST instead of FIN.
    side.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    side.transport.abort()
