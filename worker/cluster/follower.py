"""A follower's connection to the head: it joins, sends its terms, and notices when the head is gone."""

import asyncio
import logging
import secrets
from typing import NoReturn

from worker import race
from worker.cluster import wire
from worker.cluster.beats import BEAT_SECONDS, Hearing
from worker.cluster.cluster import FINISHED
from worker.cluster.link import REPORT_SECONDS, Link, Place, now, open_port, reason_of
from worker.cluster.roster import HEAD, STOPPED, Loss, name_of
from worker.cluster.terms import Terms
from worker.cluster.wire import Peer, WireError
from worker.errors import Json

log = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
RETRY_SECONDS = 1.0


class Follower(Link):
    """Looks for the head until it is there, then stays connected."""

    def __init__(self, place: Place, versions: Terms) -> None:
        super().__init__(place)
        self._versions = versions
        self._terms: Terms | None = None
        self._nonce = secrets.token_hex(16)
        self._writer: asyncio.StreamWriter | None = None
        self._hearing = Hearing(now(), place.silence)
        self._head = name_of(HEAD, place.role.head)
        self._reported = now()
        self._leaves = False
        self._last_word = ""
        """Why the head ended the cluster before this node was welcome. It says more than that the port is closed."""

    def join(self) -> None:
        """Begin to look for the head.

        Raises:
            ConfigurationError: NODE_ADDR is no address of this machine.
        """
        self._probed = open_port(self.place.address, 0)
        super().join()

    async def _leave(self, what: str) -> None:
        if self._over:
            return
        self._send({"leaving": what})
        if what != STOPPED:
            # This node's own failure ends it.
            self._over = True
        elif self._joined.done():
            self._leaves = True
        else:
            self._finish()

    async def _run(self) -> None:
        role = self.place.role
        log.info("%s joins %s at port %d", str(role).capitalize(), self._head, self.place.port)
        deadline = now() + self.place.timeout
        while not self._over:
            try:
                await self._attend()
            except (OSError, WireError, TimeoutError) as error:
                self._ended(reason_of(error), deadline)
            finally:
                self._close()
            if not self._over:
                await asyncio.sleep(RETRY_SECONDS)

    def _ended(self, reason: str, deadline: float) -> None:
        """The connection has ended, or there was none. Without an agreement on who takes part, it is tried again."""
        if self._leaves:
            self._finish()
        elif self._joined.done():
            self._lose(Loss(self._head, f"was lost: {reason}"))
        elif now() > deadline:
            limit = f"CLUSTER_TIMEOUT={self.place.timeout:g} s"
            reason = self._last_word or reason
            self._lose(Loss(self._head, f"could not be joined at port {self.place.port} within {limit}: {reason}"))
        elif now() - self._reported > REPORT_SECONDS:
            self._reported = now()
            log.info("Waiting for %s at port %d: %s", self._head, self.place.port, reason)

    async def _attend(self) -> NoReturn:
        """Connect, and stay connected until the connection ends or the head is silent."""
        place = self.place
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection(
                place.role.head, place.port, limit=wire.LINE_BYTES, local_addr=(place.address, 0)
            )
            self._writer = writer
            hello = await wire.receive(reader)
        if hello.get("hello") != wire.PROTOCOL:
            raise WireError("is no head of this release of the worker")
        join = place.join(self._versions, self._probed.getsockname()[1])
        proof = wire.proof(place.key, "node", str(place.role.rank), wire.text(hello, "nonce"))
        self._send(join.message(self._nonce, proof))
        self._send_terms()
        self._hearing = Hearing(now(), place.silence)
        self._hearing.heard(HEAD, now())
        ended = await race.first(self._listen(reader), self._beat())
        raise ended.exception() or WireError("closed the connection")

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while not self._over:
            message = await wire.receive(reader)
            self._hearing.heard(HEAD, now())
            self._on(message)

    async def _beat(self) -> None:
        while not self._hearing.silent(now()):
            self._send({"beat": self.phase})
            await asyncio.sleep(BEAT_SECONDS)
        raise WireError(f"sent nothing for {self._hearing.silence:g} s")

    def _on(self, message: Json) -> None:
        match message:
            case {"welcome": _}:
                self._welcome(wire.peers(message), wire.text(message, "proof"))
            case {"refuse": _, "again": True}:
                raise WireError(f"refused this node: {' '.join(wire.texts(message, 'refuse'))}")
            case {"refuse": _}:
                reasons = "; ".join(wire.texts(message, "refuse")).rstrip(".")
                self._refuse(f"{self._head} refused this node: {reasons}")
            case {"go": True} if self._joined.done() and not self._agreed.done():
                self._agreed.set_result(None)
            case {"lost": _}:
                self._end(Loss(wire.text(message, "lost"), wire.text(message, "what")))
            case {"bye": _}:
                self._end(Loss(self._head, wire.text(message, "bye")))
            case {"beat": _}:
                self.is_serving = message.get("serving") is True
                self._nodes = wire.nodes(message)

    def describe(self) -> Json:
        """Return role, rank and nodes. The silence of the head is this node's own measure."""
        heard = {"heard_seconds": self._hearing.seconds(HEAD, now())}
        nodes = [{**node, **heard} if node.get("rank") == HEAD else node for node in self._nodes]
        return {**super().describe(), "nodes": nodes}

    def _welcome(self, peers: dict[int, Peer], proof: str) -> None:
        if not wire.is_proof(proof, self.place.key, "head", self._nonce):
            self._refuse(f"{self._head} does not know the key of this node. Set the same CLUSTER_KEY on all nodes")
        elif not self._joined.done():
            self._have_joined(peers)

    def _end(self, loss: Loss) -> None:
        """The head says that the cluster ends. Before the welcome, it has not proved that it is the head."""
        if not self._joined.done():
            ended = f"has ended the cluster: {loss}"
            self._last_word = f"it {ended}"
            raise WireError(ended)
        if loss.what == FINISHED or self._leaves:
            self._finish()
        else:
            self._lose(loss)

    def _agree(self, terms: Terms) -> None:
        self._terms = terms
        self._send_terms()

    def _send_terms(self) -> None:
        if self._terms is not None:
            self._send({"terms": self._terms})

    def _send(self, message: Json) -> None:
        if self._writer is not None:
            self._writer.write(wire.encode(message))

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
