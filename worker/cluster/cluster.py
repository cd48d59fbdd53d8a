"""The other machines as the rest of the worker sees them, and the null object for a single machine."""

from abc import ABC, abstractmethod

from worker.cluster.roster import STOPPED
from worker.cluster.terms import Terms
from worker.errors import Json, StartupError

FINISHED = "has finished"
"""The head's last word when its work is done: the followers end with code 0."""


class Cluster(ABC):
    """The other machines, as the rest of the worker sees them. Any thread may call it."""

    problem: StartupError | None = None
    """Why the cluster cannot start or go on. If a node is lost, the engine has been killed, and this process ends."""
    is_serving = False
    """Whether the head answers requests."""
    finished = False
    """Whether the cluster has ended as it should: the head's work is done, or this node was stopped."""
    addresses: dict[int, str]
    """The address of each node, once all have joined: after `agree`."""

    @abstractmethod
    def join(self) -> None:
        """Begin to look for the other nodes. It goes on in the background."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until all nodes have joined, so that `addresses` are known.

        Raises:
            StartupError: as `agree`.
        """

    @abstractmethod
    def agree(self, terms: Terms) -> None:
        """Wait until all nodes have the same terms.

        Raises:
            ConfigurationError: the terms or versions of a node differ.
            StartupError: a node did not come in time, or is lost.
        """

    @abstractmethod
    def check(self, patience: float = 0.0) -> None:
        """Raise the cluster's problem if there is one, waiting up to `patience` seconds for it.

        Call it after any failure: when a node fails, processes on the others may die before its message arrives.

        Raises:
            StartupError: the cluster is over.
        """

    @abstractmethod
    def announce_ready(self) -> None:
        """Tell the others that this node's part of the model is loaded; the head, that it answers requests."""

    @abstractmethod
    def leave(self, what: str = STOPPED) -> None:
        """Tell the others that this node is about to end; `what` is the rest of a sentence about it.

        The head's connections are closed. A follower that `was stopped` stays until the head has ended.
        """

    @abstractmethod
    def describe(self) -> Json:
        """Return role, rank and nodes, for `/health`."""


class SingleMachine(Cluster):
    """One machine."""

    def __init__(self) -> None:
        self.addresses = {}

    def join(self) -> None:
        """Do nothing."""

    def wait(self) -> None:
        """Do nothing."""

    def agree(self, terms: Terms) -> None:
        """Do nothing."""

    def check(self, patience: float = 0.0) -> None:
        """Do nothing."""

    def announce_ready(self) -> None:
        """Do nothing."""

    def leave(self, what: str = STOPPED) -> None:
        """Do nothing."""

    def describe(self) -> Json:
        """Return nothing."""
        return {}
