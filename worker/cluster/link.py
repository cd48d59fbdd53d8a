"""A node's part of the control connection: a thread with an event loop, and what the rest of the worker sees of it."""

import asyncio
import logging
import os
import socket
import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field

from worker.cluster.beats import SILENCE_SECONDS
from worker.cluster.cluster import Cluster
from worker.cluster.ending import Ending
from worker.cluster.role import Role
from worker.cluster.roster import STOPPED, Loss, name_of
from worker.cluster.terms import Terms
from worker.cluster.wire import Join, Peer, WireError
from worker.errors import ConfigurationError, Json, StartupError
from worker.forks import PausedInForks

log = logging.getLogger(__name__)

REACH_SECONDS = 5.0
PATIENCE_SECONDS = 0.5
"""How long a node that has failed waits for the word of another node that has failed before it."""
REPORT_SECONDS = 30.0
"""How often a node that waits for another one logs why."""
CLOSE_SECONDS = 1.0
"""How long a node that ends waits until the others have read why."""


@dataclass(frozen=True)
class Place:
    """Where a node is in its cluster, and how it reaches the others."""

    role: Role
    address: str
    """This node's own address in the cluster's network."""
    port: int
    """The head's port for this connection."""
    timeout: float
    """Seconds until all nodes must have joined."""
    key: bytes = field(default=b"", repr=False)
    gpus: str = ""
    """The number and name of its GPUs."""
    silence: float = SILENCE_SECONDS

    def join(self, versions: Terms, port: int) -> Join:
        """Return the request to join; `port` is the one that the others try to reach."""
        return Join(self.role.rank, self.role.nodes, self.address, port, self.gpus, versions)


class Link(Cluster):
    """What head and followers share.

    `_run`, `_agree`, `_leave`, and what they call, run in the link's loop. The rest of the worker calls the others.
    """

    _probed: socket.socket
    """Listens on a port that the others try to reach, from `join` on. Nobody needs to accept: the kernel answers."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.addresses = {}
        self._peers: dict[int, Peer] = {}
        self.phase = "downloading"
        self._nodes: list[Json] = []
        self._ending = Ending()
        self._has_left = False
        self._over = False
        """Whether nothing that happens to the others matters any more."""
        self._has_problem = threading.Event()
        self._joined: Future[None] = Future()
        self._agreed: Future[None] = Future()
        self._thread = threading.Thread(target=self._serve, name="cluster", daemon=True)

    def join(self) -> None:
        """Begin to look for the other nodes."""
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._pauses = PausedInForks(self._thread, self._loop)
        self._thread.start()

    def wait(self) -> None:
        """Wait until all nodes have joined."""
        self._result(self._joined)

    def agree(self, terms: Terms) -> None:
        """Wait until all nodes have the same terms."""
        self.wait()
        self._reach_all()
        self._call(lambda: self._agree(terms))
        self._result(self._agreed)
        self._probed.close()
        self.phase = "loading"

    def _reach_all(self) -> None:
        """Check that the network lets vLLM's connections pass, which it would wait for without a limit."""
        for rank, (address, port) in self._peers.items():
            if rank == self.place.role.rank:
                continue
            try:
                socket.create_connection((address, port), REACH_SECONDS).close()
            except OSError as error:
                self.check(PATIENCE_SECONDS)
                peer = name_of(rank, address)
                self.leave(f"cannot reach {peer}")
                raise StartupError(
                    f"This node cannot reach {peer} at port {port}: {reason_of(error)}. vLLM uses ports that the "
                    "operating system chooses. Allow all TCP connections between the nodes."
                ) from None

    def _result(self, future: "Future[None]") -> None:
        wait([future])
        self.check()
        future.result()

    def check(self, patience: float = 0.0) -> None:
        """Raise the reason if the cluster is over, or is soon."""
        self._has_problem.wait(patience)
        if self.problem is not None:
            self._ending.noticed()
            raise self.problem

    def announce_ready(self) -> None:
        """Tell the others that this node's part of the model is loaded."""
        self.phase = "ready"

    def leave(self, what: str = STOPPED) -> None:
        """Tell the others that this node is about to end. Only the first call counts."""
        if self._thread.is_alive() and not self._has_left:
            self._has_left = True
            leaving = self._leave(what)
            # The loop may end meanwhile, because the cluster is over.
            with suppress(TimeoutError, CancelledError):
                try:
                    left = asyncio.run_coroutine_threadsafe(leaving, self._loop)
                except RuntimeError:
                    leaving.close()
                    return
                left.result(timeout=2 * CLOSE_SECONDS)

    def describe(self) -> Json:
        """Return role, rank and nodes."""
        return {
            "role": self.place.role.name,
            "rank": self.place.role.rank,
            "size": self.place.role.nodes,
            "nodes": self._nodes,
        }

    def _call(self, function: Callable[[], object]) -> None:
        """Call a function in the loop. Without effect once the loop has ended."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function)

    def _serve(self) -> None:
        try:
            with self._runner:
                self._runner.run(self._run())
        finally:
            # Without effect unless the loop failed: nobody would notice a loss any more.
            self._lose(Loss("the connection to the other nodes", "has failed; the log has the cause"))

    @abstractmethod
    async def _run(self) -> None:
        """Serve the connection until the cluster is over."""

    @abstractmethod
    def _agree(self, terms: Terms) -> None:
        """Send this node's terms."""

    @abstractmethod
    async def _leave(self, what: str) -> None:
        """Say that this node ends."""

    def _lose(self, loss: Loss) -> None:
        """A node is lost: end the engine, and this process."""
        if not self._over:
            self._fail(StartupError(f"{sentence(str(loss))} This node ends, too."), code=1)

    def _refuse(self, reason: str) -> None:
        """The settings cannot work. Whoever waits for the cluster gets the reason; a download is ended."""
        if not self._over:
            self._fail(ConfigurationError(sentence(reason)), code=None)

    def _fail(self, problem: StartupError, code: int | None) -> None:
        self._over, self.problem = True, problem
        self._has_problem.set()
        log.error("The cluster is over: %s", problem)
        for future in (self._joined, self._agreed):
            if not future.done():
                future.set_exception(problem)
        self._ending.begin(code)

    def _finish(self) -> None:
        """The cluster has ended as it should: end what is left of the engine."""
        if not self._over:
            self._over = self.finished = True
            for future in (self._joined, self._agreed):
                if not future.done():
                    future.set_exception(StartupError("The cluster has ended."))
            self._ending.begin(0)

    def _have_joined(self, peers: dict[int, Peer]) -> None:
        self.addresses = {rank: address for rank, (address, _) in peers.items()}
        self._peers = peers
        log.info("All %d nodes have joined", self.place.role.nodes)
        self._joined.set_result(None)


def open_port(address: str, port: int) -> socket.socket:
    """Return a socket that listens at an address; port 0 leaves the port to the operating system.

    Raises:
        ConfigurationError: this is not possible.
    """
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((address, port), family=family)
    except OSError as error:
        raise ConfigurationError(
            f"The cluster's port {port or ''} cannot be opened at {address!r}: {error.strerror}. NODE_ADDR must be an "
            "address of this machine. Choose another port with CLUSTER_PORT, on all nodes."
        ) from None


def now() -> float:
    """Return the time that all limits are counted in."""
    return time.monotonic()


def reason_of(error: Exception) -> str:
    """Return why a connection has ended, in words."""
    if isinstance(error, WireError):
        return f"it {error}"
    if isinstance(error, socket.gaierror):
        return "its name cannot be resolved"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return "it did not answer in time" if isinstance(error, TimeoutError) else str(error)


def sentence(text: str) -> str:
    """Return a text as a sentence."""
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."
