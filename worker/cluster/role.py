"""The role of this machine in a cluster, from the variables of RunPod's Instant Clusters or of vLLM. Pure."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Self

from worker import redaction
from worker.errors import ConfigurationError

NODES = ("NNODES", "NUM_NODES")
"""vLLM's name comes first, then RunPod's."""
HEAD = ("MASTER_ADDR", "PRIMARY_ADDR")
PORT = ("MASTER_PORT", "PRIMARY_PORT")
OWN = ("VLLM_HOST_IP", "NODE_ADDR")
RANK = "NODE_RANK"
GPUS = "NUM_TRAINERS"
HEAD_AND_PORT = "HOST_NODE_ADDR"
"""RunPod's name for the head's address with its port."""
BACKENDS = ("DISTRIBUTED_EXECUTOR_BACKEND", "DATA_PARALLEL_BACKEND")
DEFAULT_PORT = 29501
"""vLLM's."""
MOST_PORT = 65535

Described = Callable[[str], str]
"""Returns a variable's name with its source."""


@dataclass(frozen=True, slots=True)
class Role:
    """One machine's place among the nodes of a cluster. Node 0 is the head; the others are followers."""

    rank: int
    nodes: int
    head: str
    """The head's address, or a name that is looked up each time."""
    address: str | None
    """This machine's own address. None: it follows from the route to the head."""
    gpus: int | None
    """The number of GPUs that each node should have. None: as many as there are."""
    port: int
    """The port on which vLLM's processes find each other."""

    @property
    def is_head(self) -> bool:
        """Whether this machine serves the requests."""
        return self.rank == 0

    @property
    def is_follower(self) -> bool:
        """Whether this machine only computes."""
        return not self.is_head

    @property
    def name(self) -> str:
        """`head` or `follower`."""
        return "head" if self.is_head else "follower"

    def usable_gpus(self, visible: int) -> int:
        """Return how many of the `visible` GPUs each node uses.

        Raises:
            ConfigurationError: there are too few.
        """
        if visible < (self.gpus or 0):
            raise ConfigurationError(
                f"{GPUS}={self.gpus}: only {visible} GPUs are visible on this node, and all nodes need the same "
                f"number. Correct {GPUS} on all nodes, or make more GPUs visible."
            )
        return self.gpus or visible

    def __str__(self) -> str:
        """Return the node's number and the number of nodes."""
        return f"node {self.rank} of {self.nodes}"

    @classmethod
    def of(cls, values: Mapping[str, str], described: Described = str) -> Self | None:
        """Return the role that the variables describe; None for a single machine, and where Ray connects the machines.

        Raises:
            ConfigurationError: a variable is wrong or missing, or two disagree. The message has one line for each.
        """
        reader = _Reader({name: text for name, value in values.items() if (text := value.strip())}, described)
        nodes = reader.number(NODES, least=1) or 1
        if nodes == 1:
            role = None
        elif uses_ray(values):
            reader.refuse_follower()
            role = None
        else:
            role = cls(
                rank=reader.rank(nodes),
                nodes=nodes,
                head=reader.head(),
                address=reader.address(OWN),
                gpus=reader.number((GPUS,), least=1),
                port=reader.port(),
            )
        if reader.mistakes:
            raise ConfigurationError("\n".join(reader.mistakes))
        return role


def uses_ray(values: Mapping[str, str]) -> bool:
    """Return whether Ray starts vLLM's processes on the other machines."""
    words = redaction.flag_values(values.get(redaction.EXTRA_ARGS, ""))
    extra = {flag.strip("-").replace("-", "_").upper(): word for flag, word in words}
    return any((extra.get(name) or values.get(name, "")).strip().lower() == "ray" for name in BACKENDS)


class _Reader:
    """Reads variables, and collects what is wrong with them."""

    def __init__(self, values: Mapping[str, str], described: Described) -> None:
        self._values = values
        self._described = described
        self.mistakes: list[str] = []

    def number(self, names: tuple[str, ...], least: int, most: int | None = None) -> int | None:
        """Return the number that these variables have; None if none is set, or one is wrong."""
        numbers = {name: self._number(name, least, most) for name in self._set(names)}
        if None not in numbers.values():
            self._compare(numbers)
        return next(iter(numbers.values()), None)

    def address(self, names: tuple[str, ...]) -> str | None:
        """Return the address or host name that the first of these variables has."""
        found = {name: self._values[name].strip("[]") for name in self._set(names)}
        for name, value in found.items():
            if not _is_ip(value) and re.search(r"[\s/:@]", value):
                self.mistakes.append(f"{self._shown(name)}: expected an IP address or a host name, without a port.")
        # A host name may stand for the same address.
        self._compare({name: ip_address(value) for name, value in found.items() if _is_ip(value)})
        return next(iter(found.values()), None)

    def rank(self, nodes: int) -> int:
        """Return this node's number."""
        if RANK not in self._values:
            self.mistakes.append(f"{RANK} is not set. It is this node's number, from 0 to {nodes - 1}.")
        return self.number((RANK,), 0, nodes - 1) or 0

    def head(self) -> str:
        """Return the address or host name of the head."""
        if not (head := self.address(HEAD) or self._head_and_port()[0]):
            self.mistakes.append(f"{' or '.join(HEAD)} is not set. It is the address of node 0, such as 10.0.0.1.")
        elif _is_loopback(head) and (own := self.address(OWN)) and not _is_loopback(own):
            self.mistakes.append(f"{head!r} leads every node to itself. {' or '.join(HEAD)} is the address of node 0.")
        return head

    def port(self) -> int:
        """Return the port on which vLLM's processes find each other."""
        port = self._head_and_port()[1]
        return self.number(PORT, 1, MOST_PORT) or (int(port) if port.isdecimal() else 0) or DEFAULT_PORT

    def refuse_follower(self) -> None:
        """Note a mistake if this is not the first node of a cluster that Ray connects."""
        if self._values.get(RANK, "0") != "0":
            self.mistakes.append(
                f"{self._shown(RANK)}: with Ray, only the node with {RANK}=0 runs the worker. Start Ray on the others."
            )

    def _set(self, names: tuple[str, ...]) -> list[str]:
        return [name for name in names if name in self._values]

    def _head_and_port(self) -> tuple[str, str]:
        host, _, port = self._values.get(HEAD_AND_PORT, "").rpartition(":")
        return host.strip("[]"), port

    def _number(self, name: str, least: int, most: int | None) -> int | None:
        text = self._values[name]
        if text.isdecimal() and text.isascii() and least <= int(text) and (most is None or int(text) <= most):
            return int(text)
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        self.mistakes.append(f"{self._shown(name)}: expected a whole number {span}.")
        return None

    def _compare(self, found: Mapping[str, object]) -> None:
        if len(set(found.values())) > 1:
            shown = " and ".join(map(self._shown, found))
            self.mistakes.append(f"{shown} disagree. Set one of them, or both to the same value.")

    def _shown(self, name: str) -> str:
        return f"{self._described(name)}={redaction.public(self._values[name], name)!r}"


def _is_loopback(text: str) -> bool:
    return text == "localhost" or (_is_ip(text) and ip_address(text).is_loopback)


def _is_ip(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
