"""The network interface over which this machine reaches the other nodes."""

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address

import psutil

from worker.cluster.role import Role
from worker.errors import ConfigurationError, StartupError

Addresses = Mapping[str, Sequence[str]]
"""The IP addresses of each interface."""


class NetworkNotReadyError(StartupError):
    """A name cannot be looked up, or there is no route, which may pass: the nodes start in any order."""


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface of this machine, and its address in the cluster's network."""

    name: str
    address: str


def find(role: Role, machine: Addresses | None = None) -> Interface:
    """Return the interface that has the node's own address, or else the one that leads to the head.

    `machine` has the interfaces. Default: those of this machine.

    Raises:
        ConfigurationError: no interface has the address.
        NetworkNotReadyError: a name cannot be looked up yet, or there is no route to the head yet.
    """
    machine = addresses() if machine is None else machine
    candidates = _lookup(role.address) if role.address else [_route(role.head, role.port)]
    for name, own in machine.items():
        for address in candidates:
            if address in own:
                return Interface(name, address)
    known = ", ".join(f"{address} ({name})" for name, own in machine.items() for address in own)
    raise ConfigurationError(
        f"No network interface of this machine has the node's address {role.address or candidates[0]!r}. There are "
        f"{known}. Correct NODE_ADDR and VLLM_HOST_IP, or set neither."
    )


def remarks(role: Role, own: Interface) -> Iterator[str]:
    """Yield a warning if this is the head, but the others look for the head at another address."""
    if role.is_follower:
        return
    with suppress(NetworkNotReadyError):
        found = _lookup(role.head)
        if own.address not in found:
            yield (
                f"This is node 0, at {own.address}, but the head's address {role.head} leads to {', '.join(found)}. "
                "If the other nodes do not find this one, correct PRIMARY_ADDR or NODE_ADDR."
            )


def addresses() -> dict[str, list[str]]:
    """Return the IP addresses of each interface of this machine."""
    return {
        name: [_normal(each.address) for each in found if each.family in (socket.AF_INET, socket.AF_INET6)]
        for name, found in psutil.net_if_addrs().items()
    }


def _lookup(name: str) -> list[str]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise NetworkNotReadyError(f"The host name {name!r} cannot be looked up.") from None
    return list(dict.fromkeys(_normal(str(each[4][0])) for each in found))


def _route(host: str, port: int) -> str:
    """Return the address from which this machine reaches a host. Nothing is sent."""
    (target, *_) = _lookup(host)
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, port))
        except OSError as error:
            raise NetworkNotReadyError(f"There is no route to the head {host}: {error.strerror}.") from None
        return _normal(str(probe.getsockname()[0]))


def _normal(address: str) -> str:
    return str(ip_address(address.partition("%")[0]))
