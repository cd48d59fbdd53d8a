"""The head of a cluster: it waits for the other nodes, compares them with itself, and notices when one is gone."""

import asyncio
import logging
import secrets
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress

from worker import race
from worker.cluster import wire
from worker.cluster.beats import BEAT_SECONDS
from worker.cluster.link import CLOSE_SECONDS, Link, Place, now, open_port, reason_of, sentence
from worker.cluster.roster import (
    HEAD,
    STOPPED,
    Drop,
    End,
    Event,
    Go,
    Refuse,
    Reject,
    Roster,
    Stopping,
    Welcome,
)
from worker.cluster.terms import Terms
from worker.cluster.wire import Join, Peer, WireError
from worker.errors import Json, StartupError

log = logging.getLogger(__name__)

FIRST_SECONDS = 5.0
"""The time for the first message of a connection."""
CONNECTIONS_PER_NODE = 4
STRANGERS_LOGGED = 20
WRONG_KEY = "The key differs from the head's. Set the same CLUSTER_KEY, or else the same WORKER_API_KEY, on all nodes."


class Head(Link):
    """Listens for the other nodes. `stop` is called in the link's thread when a follower is being stopped."""

    def __init__(
        self,
        place: Place,
        versions: Terms,
        stop: Callable[[], object] = lambda: None,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(place)
        self._versions = versions
        self._stop = stop
        self._is_stopping = is_stopping
        self._stopped = ""
        """The follower that is being stopped."""
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._nonces: dict[int, str] = {}
        self._handlers: set[asyncio.Task[None]] = set()
        self._strangers: set[str] = set()
        self._closing = asyncio.Event()
        self._listener: socket.socket | None = None

    def join(self) -> None:
        """Listen for the other nodes.

        Raises:
            ConfigurationError: the port cannot be opened.
        """
        self._listener = open_port(self.place.address, self.place.port)
        self._probed = open_port(self.place.address, 0)
        join = self.place.join(self._versions, self._probed.getsockname()[1])
        self._roster = Roster(join, self.place.timeout, now(), self.place.silence)
        super().join()

    def announce_ready(self) -> None:
        """Tell the others that requests are answered."""
        super().announce_ready()
        self.is_serving = True
        self._call(self._beat)

    async def _leave(self, what: str) -> None:
        self._over = True
        self._roster.close()
        self._send({"lost": self._stopped, "what": STOPPED} if self._stopped else {"bye": what})
        if self._handlers:
            await asyncio.wait(self._handlers, timeout=CLOSE_SECONDS)
        self._closing.set()

    async def _run(self) -> None:
        server = await asyncio.start_server(self._handle, sock=self._listener, limit=wire.LINE_BYTES)
        log.info(
            "Waiting until all %d nodes have joined at %s:%d",
            self.place.role.nodes,
            self.place.address,
            self.place.port,
        )
        try:
            while not self._closing.is_set():
                self._apply(self._roster.tick(now()))
                self._beat()
                await race.first(self._closing.wait(), asyncio.sleep(BEAT_SECONDS))
        finally:
            server.close()

    def _beat(self) -> None:
        self._nodes = self._roster.describe(now(), self.phase)
        self._send({"beat": self.phase, "serving": self.is_serving, "nodes": self._nodes})

    def _agree(self, terms: Terms) -> None:
        self._apply(self._roster.agreed(HEAD, terms))

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._handlers) >= CONNECTIONS_PER_NODE * self.place.role.nodes:
            writer.close()
            return
        self._handlers.add(task)
        try:
            await self._converse(reader, writer)
        except (OSError, WireError) as error:
            log.debug("A connection to the cluster's port has ended: %s", error)
        finally:
            self._handlers.discard(task)
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonce = secrets.token_hex(16)
        writer.write(wire.encode({"hello": wire.PROTOCOL, "nonce": nonce}))
        try:
            async with asyncio.timeout(FIRST_SECONDS):
                message = await wire.receive(reader)
                join, proof, others = Join.of(message), wire.text(message, "proof"), wire.text(message, "nonce")
        except (OSError, WireError, TimeoutError) as error:
            self._turn_away(writer, reason_of(error))
            return
        if not wire.is_proof(proof, self.place.key, "node", str(join.rank), nonce):
            self._turn_away(writer, "its key is wrong")
            writer.write(wire.encode({"refuse": [WRONG_KEY], "again": False}))
        elif self._admit(join, others, writer):
            await self._listen(join.rank, reader, writer)
            return
        # Closed at once, a connection with unread bytes would lose the refusal.
        await race.first(_read_to_the_end(reader), asyncio.sleep(FIRST_SECONDS))

    def _turn_away(self, writer: asyncio.StreamWriter, why: str) -> None:
        """Note that a stranger was refused. Only the first ones are logged."""
        address = writer.get_extra_info("peername")[0]
        self._roster.turned_away(address, why)
        if (stranger := f"{address}: {why}") not in self._strangers and len(self._strangers) < STRANGERS_LOGGED:
            self._strangers.add(stranger)
            log.warning("A connection to the cluster's port was refused, from %s", stranger)

    def _admit(self, join: Join, nonce: str, writer: asyncio.StreamWriter) -> bool:
        """Let a node join, unless it is refused."""
        events = self._roster.joined(join, now())
        if any(isinstance(event, Refuse) for event in events):
            self._apply(events, asker=writer)
            return False
        self._writers[join.rank], self._nonces[join.rank] = writer, nonce
        log.info("%s has joined: %s", self._roster.name(join.rank), join.gpus or "no GPU")
        if join.gpus != self.place.gpus:
            log.warning("%s has other GPUs: %s, %s here", self._roster.name(join.rank), join.gpus, self.place.gpus)
        self._apply(events)
        return True

    async def _listen(self, rank: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read the messages of a node that has joined, until its connection ends. Ignore those of a refused one."""
        try:
            while True:
                message = await wire.receive(reader)
                if self._writers.get(rank) is writer:
                    self._on(rank, message)
        except (OSError, WireError) as error:
            if self._writers.get(rank) is writer:
                del self._writers[rank]
                self._apply(self._roster.gone(rank, f"was lost: {reason_of(error)}"))

    def _on(self, rank: int, message: Json) -> None:
        self._roster.heard(rank, now(), wire.text(message, "beat", 40) if "beat" in message else "")
        if "terms" in message:
            self._apply(self._roster.agreed(rank, wire.terms(message)))
        elif "leaving" in message:
            self._apply(self._roster.leaving(rank, wire.text(message, "leaving")))

    def _apply(self, events: Iterable[Event], asker: asyncio.StreamWriter | None = None) -> None:
        """Do what the roster says. `asker` is the connection of a node that has not joined."""
        for event in events:
            match event:
                case Welcome(peers):
                    self._welcome(peers)
                case Go():
                    self._send({"go": True})
                    self._agreed.set_result(None)
                case Refuse(rank, reasons, again):
                    writer = asker or self._writers.pop(rank)
                    writer.write(wire.encode({"refuse": reasons, "again": again}))
                case Reject(reason):
                    self._send({"refuse": [reason], "again": False})
                    self._refuse(reason)
                case Drop(rank, why):
                    log.warning("Node %d %s. It is waited for again.", rank, why)
                    if (dropped := self._writers.pop(rank, None)) is not None:
                        dropped.close()
                case Stopping(node):
                    self._stopped = node
                    if self._is_stopping():
                        # Both were stopped, as when all nodes are.
                        continue
                    # The engine goes on, so that running requests can end.
                    self.problem = StartupError(f"{sentence(f'{node} is being stopped')} This node ends, too.")
                    log.warning("%s", self.problem)
                    self._stop()
                case End(loss):
                    self._send({"lost": loss.node, "what": loss.what})
                    self._lose(loss)

    def _welcome(self, peers: dict[int, Peer]) -> None:
        known = {str(rank): peer for rank, peer in peers.items()}
        for rank, writer in self._writers.items():
            proof = wire.proof(self.place.key, "head", self._nonces[rank])
            writer.write(wire.encode({"welcome": known, "proof": proof}))
        self._have_joined(peers)

    def _send(self, message: Json) -> None:
        """Send a message to all nodes that have joined."""
        line = wire.encode(message)
        for writer in self._writers.values():
            writer.write(line)


async def _read_to_the_end(reader: asyncio.StreamReader) -> None:
    with suppress(OSError):
        while await reader.read(wire.LINE_BYTES):
            pass
