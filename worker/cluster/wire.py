"""Messages of the control connection: JSON objects, one a line.

Every value is checked when it is read. The functions that read a value raise `WireError` if it is invalid.
"""

import asyncio
import hmac
import json
from dataclasses import dataclass
from typing import Any, Self

from worker.cluster.role import MOST_PORT
from worker.cluster.terms import Terms, printable
from worker.errors import Json

PROTOCOL = 1
"""Increase it when `hello`, `join` or `refuse` changes. Nodes of different releases exchange no other messages."""
LINE_BYTES = 256 * 1024
TEXT_CHARACTERS = 2000

Peer = tuple[str, int]
"""A node's address, and a port of it that the others try to reach."""


class WireError(Exception):
    """The peer is no node of a cluster: it sent something else than the expected message, or too much."""


def encode(message: Json) -> bytes:
    """Return a message as a line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Json:
    """Return the message of a line, or raise `WireError`."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        raise WireError("sent a line that is not JSON") from None
    if not isinstance(message, dict):
        raise WireError("sent a line that is not a JSON object")
    return message


async def receive(reader: asyncio.StreamReader) -> Json:
    """Return the next message.

    Raises:
        WireError: it is invalid or longer than the reader's limit, or the connection has ended.
    """
    try:
        line = await reader.readline()
    except ValueError:
        raise WireError(f"sent a line of more than {LINE_BYTES} bytes") from None
    if not line.endswith(b"\n"):
        raise WireError("closed the connection")
    return decode(line)


def text(message: Json, name: str, most: int = TEXT_CHARACTERS) -> str:
    """Return a text in a message, cut to `most` printable characters."""
    value = message.get(name)
    if not isinstance(value, str):
        raise WireError(f"sent a message whose {name!r} is no text")
    return printable(value, most)


def number(message: Json, name: str) -> int:
    """Return a number in a message."""
    value = message.get(name)
    if type(value) is not int:
        raise WireError(f"sent a message whose {name!r} is no integer")
    return value


def texts(message: Json, name: str) -> list[str]:
    """Return a list of texts in a message."""
    values = message.get(name)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise WireError(f"sent a message whose {name!r} is no list of texts")
    return [printable(value, TEXT_CHARACTERS) for value in values]


def terms(message: Json) -> Terms:
    """Return the terms in a message."""
    found = message.get("terms")
    if not isinstance(found, dict) or not all(_is_term(value) for value in found.values()):
        raise WireError("sent a message whose 'terms' are no pairs of texts")
    return {printable(name): (digest, printable(value, TEXT_CHARACTERS)) for name, (digest, value) in found.items()}


def peers(message: Json) -> dict[int, Peer]:
    """Return the address and the port of all nodes in a welcome."""
    found = message.get("welcome")
    if not isinstance(found, dict) or not all(map(_is_peer, found.items())):
        raise WireError("sent a message whose 'welcome' has no addresses")
    return {int(rank): (printable(address), port) for rank, (address, port) in found.items()}


def nodes(message: Json) -> list[Json]:
    """Return the descriptions of nodes in a message."""
    found = message.get("nodes")
    if not isinstance(found, list) or not all(isinstance(each, dict) and _is_node(each) for each in found):
        raise WireError("sent a message whose 'nodes' are no descriptions")
    return found


def proof(key: bytes, *parts: str) -> str:
    """Return a proof that its sender knows the key. `parts` say for what; one of them is the other side's nonce."""
    return hmac.digest(key, "\n".join(parts).encode(), "sha256").hex()


def is_proof(given: str, key: bytes, *parts: str) -> bool:
    """Return whether `given` is the proof for `parts`."""
    return hmac.compare_digest(given.encode(), proof(key, *parts).encode())


@dataclass(frozen=True)
class Join:
    """A node's request to join."""

    rank: int
    nodes: int
    """The number of nodes that its settings name."""
    address: str
    port: int
    """A port that its operating system has chosen, as it does for vLLM. The others try to reach it."""
    gpus: str
    terms: Terms
    """What is known at once: the versions."""

    def message(self, nonce: str, proof: str) -> Json:
        """Return the message."""
        return {"join": PROTOCOL, **vars(self), "nonce": nonce, "proof": proof}

    @classmethod
    def of(cls, message: Json) -> Self:
        """Read the message, or raise `WireError`."""
        rank, nodes = number(message, "rank"), number(message, "nodes")
        return cls(
            rank,
            nodes,
            text(message, "address", 100),
            number(message, "port"),
            text(message, "gpus", 100),
            terms(message),
        )


def _is_term(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _is_peer(item: tuple[str, Any]) -> bool:
    rank, value = item
    return (
        rank.isdecimal()
        and isinstance(value, list)
        and [type(part) for part in value] == [str, int]
        and 0 < value[1] <= MOST_PORT
    )


def _is_node(value: Json) -> bool:
    kinds = {"rank": int, "address": str, "phase": str, "heard_seconds": float}
    return value.keys() == kinds.keys() and all(isinstance(value[name], kind) for name, kind in kinds.items())
