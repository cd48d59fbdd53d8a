"""The head's view of the cluster: which nodes have joined, whether they match, and which is lost.

Pure: the time is an argument. Each call returns events, which tell `head.py` what to do.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from worker.cluster.beats import SILENCE_SECONDS, Hearing
from worker.cluster.terms import Terms, differences
from worker.cluster.wire import Join, Peer
from worker.errors import Json

Stage = Literal["joining", "joined", "agreed", "over"]

HEAD = 0
STOPPED = "was stopped"


@dataclass(frozen=True)
class Loss:
    """A node that is gone, and the cluster with it."""

    node: str
    what: str
    """What happened to it, as the rest of a sentence."""

    def __str__(self) -> str:
        return f"{self.node} {self.what}"


class Welcome(NamedTuple):
    """All nodes have joined. Each gets the addresses and ports of all."""

    peers: dict[int, Peer]


class Go(NamedTuple):
    """The terms of all nodes are equal: each loads its part of the model."""


class Refuse(NamedTuple):
    """A node may not join or go on."""

    rank: int
    reasons: list[str]
    again: bool
    """Whether it may succeed later, without a change of its settings."""


class Reject(NamedTuple):
    """The cluster cannot work until somebody changes its settings. All nodes end for this reason."""

    reason: str


class Drop(NamedTuple):
    """A node that had joined is forgotten. It may join again."""

    rank: int
    why: str


class Stopping(NamedTuple):
    """A follower is being stopped. It goes on to compute, so that the head's running requests can end."""

    node: str


class End(NamedTuple):
    """A node is lost: all nodes end."""

    loss: Loss


Event = Welcome | Go | Refuse | Reject | Drop | Stopping | End


@dataclass
class Entry:
    """A node that has joined."""

    address: str
    port: int
    gpus: str = ""
    phase: str = ""
    terms: Terms | None = None
    stops: bool = False


class Roster:
    """Who has joined. Until all have, a node that goes is waited for again. After that, a loss ends the cluster."""

    def __init__(self, head: Join, timeout: float, now: float, silence: float = SILENCE_SECONDS) -> None:
        self.nodes = head.nodes
        self.stage: Stage = "joining"
        self._versions = head.terms
        self._timeout = timeout
        self._began = now
        self._hearing = Hearing(now, silence)
        self._entries = {HEAD: Entry(head.address, head.port, head.gpus)}
        self._turned_away = ""
        self._verdict = ""
        """Why the cluster cannot work, for nodes that come later."""

    def name(self, rank: int) -> str:
        """Return a node's name in messages."""
        return name_of(rank, self._entries[rank].address)

    def joined(self, join: Join, now: float) -> list[Event]:
        """A node asks to join. It has joined unless there is an event `Refuse`."""
        name = name_of(join.rank, join.address)
        if self.stage == "joining" and (mistakes := self._mistakes(join, name)):
            return mistakes
        if (refusal := self._refusal(join)) is not None:
            self.turned_away(name, " ".join(refusal.reasons))
            return [refusal]
        self._entries[join.rank] = Entry(join.address, join.port, join.gpus, "downloading")
        self._hearing.heard(join.rank, now)
        if len(self._entries) < self.nodes:
            return []
        self.stage = "joined"
        return [Welcome({rank: (entry.address, entry.port) for rank, entry in sorted(self._entries.items())})]

    def _mistakes(self, join: Join, name: str) -> list[Event]:
        """Return the refusal of a node whose settings or versions differ from the head's, in the words of both."""
        own = differences(self._versions, join.terms, there=f"on {name}")
        others = differences(join.terms, self._versions)
        if join.nodes != self.nodes:
            own.append(f"number of nodes: {self.nodes} here, {join.nodes} on {name}")
            others.append(f"number of nodes: {join.nodes} here, {self.nodes} on the head")
        return [Refuse(join.rank, others, again=False), self._reject(name, own)] if own else []

    def _refusal(self, join: Join) -> Refuse | None:
        """Return why a node may not join although the cluster can work, or None."""
        if self._verdict:
            return Refuse(join.rank, [self._verdict], again=False)
        if self.stage == "over":
            return Refuse(join.rank, ["The head is ending, and must be started again."], again=True)
        if (taken := self._entries.get(join.rank)) is not None or self.stage != "joining":
            other = taken.address if taken else "another node"
            reason = f"Node {join.rank} has joined already, from {other}. Each node needs a NODE_RANK of its own."
            return Refuse(join.rank, [reason], again=True)
        if not HEAD < join.rank < self.nodes:
            reason = f"NODE_RANK={join.rank} is not the number of a follower, from 1 to {self.nodes - 1}."
            return Refuse(join.rank, [reason], again=False)
        return None

    def _reject(self, name: str, reasons: Iterable[str]) -> Reject:
        self.stage = "over"
        reason = f"{name} does not match the head: {'; '.join(reasons)}."
        self._verdict = f"The head takes no nodes until it is started again. It said: {reason}"
        return Reject(reason)

    def heard(self, rank: int, now: float, phase: str = "") -> None:
        """A node has sent a message."""
        self._hearing.heard(rank, now)
        self._entries[rank].phase = phase or self._entries[rank].phase

    def agreed(self, rank: int, terms: Terms) -> list[Event]:
        """A node has said which arguments, weights and versions it will use."""
        self._entries[rank].terms = terms
        head = self._entries[HEAD].terms
        if self.stage in ("agreed", "over") or head is None:
            return []
        refusals: list[Event] = []
        rejection: Reject | None = None
        for other, entry in sorted(self._entries.items()):
            if entry.terms is None or other == HEAD:
                continue
            if own := differences(head, entry.terms, there=f"on {self.name(other)}"):
                refusals.append(Refuse(other, differences(entry.terms, head), again=False))
                rejection = rejection or self._reject(self.name(other), own)
        if rejection is not None:
            return [*refusals, rejection]
        if self.stage == "joined" and all(entry.terms is not None for entry in self._entries.values()):
            self.stage = "agreed"
            return [Go()]
        return []

    def leaving(self, rank: int, what: str) -> list[Event]:
        """A node says that it is about to end, and why."""
        if what != STOPPED or self.stage in ("joining", "over"):
            return self.gone(rank, what)
        known, self._entries[rank].stops = self._entries[rank].stops, True
        return [] if known else [Stopping(self.name(rank))]

    def gone(self, rank: int, what: str) -> list[Event]:
        """A node has ended, or its connection has."""
        if self.stage == "over" or rank not in self._entries:
            return []
        if self.stage == "joining":
            self._hearing.forget(rank)
            del self._entries[rank]
            return [Drop(rank, what)]
        self.stage = "over"
        return [End(Loss(self.name(rank), STOPPED if self._entries[rank].stops else what))]

    def tick(self, now: float) -> list[Event]:
        """Look for silent nodes, and for the end of the time to join. Call it every `BEAT_SECONDS`."""
        silent = self._hearing.silent(now)
        what = f"was lost: it sent nothing for {self._hearing.silence:g} s"
        events = [event for rank in silent for event in self.gone(rank, what)]
        if self.stage == "joining" and now - self._began > self._timeout:
            self.stage = "over"
            events.append(End(self._late()))
        return events

    def _late(self) -> Loss:
        missing = [str(rank) for rank in range(self.nodes) if rank not in self._entries]
        names = f"node{'s' if len(missing) > 1 else ''} {' and '.join(missing)} of {self.nodes}"
        have = "have" if len(missing) > 1 else "has"
        last = f" ({self._turned_away})" if self._turned_away else ""
        return Loss(names, f"{have} not come within CLUSTER_TIMEOUT={self._timeout:g} s{last}")

    def turned_away(self, address: str, why: str) -> None:
        """Remember why a stranger or a node was refused, for the message when a node does not come in time."""
        self._turned_away = f"{address} was refused: {why}"

    def close(self) -> None:
        """The cluster ends; nothing that happens from now on is a loss."""
        self.stage = "over"

    def describe(self, now: float, phase: str) -> list[Json]:
        """Return all nodes that have joined; `phase` is the head's own."""
        self._entries[HEAD].phase = phase
        return [
            {
                "rank": rank,
                "address": entry.address,
                "phase": entry.phase,
                "heard_seconds": self._hearing.seconds(rank, now),
            }
            for rank, entry in sorted(self._entries.items())
        ]


def name_of(rank: int, address: str) -> str:
    """Return a node's name in messages."""
    if rank == HEAD:
        return f"the head ({address})"
    return f"node {rank} ({address})"
