"""Machines as network namespaces, joined by a cable that can be pulled. They need root and iproute2."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import IO

import pytest

_NUMBERS = count()


def obstacle() -> str | None:
    """Return why the tests cannot have machines of their own here, or None."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "Network namespaces need root and the command ip (package iproute2)."
    try:
        with cable(machines=1) as network:
            subprocess.run([*network.prefix(0), "unshare", "--mount", "true"], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        return f"Network namespaces cannot be used here: {error.stderr.decode().strip()}."
    return None


def require_namespaces() -> None:
    """Skip the test where this user cannot create network namespaces."""
    if (reason := obstacle()) is not None:
        pytest.skip(reason)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Cable:
    """The network between machines with the addresses 10.21.0.1, 10.21.0.2, and so on."""

    def __init__(self, machines: int = 2) -> None:
        name = f"{os.getpid()}-{next(_NUMBERS)}"
        self.addresses = tuple(f"10.21.0.{number}" for number in range(1, machines + 1))
        self._switch = f"switch-{name}"
        self._names = tuple(f"node{rank}-{name}" for rank in range(machines))

    def prefix(self, rank: int) -> list[str]:
        """Return the beginning of a command that runs on a machine."""
        return ["ip", "netns", "exec", self._names[rank]]

    @contextmanager
    def entered(self, rank: int) -> Iterator[None]:
        """Use a machine's network in this thread, and in the threads that it starts within the block."""
        with Path("/proc/thread-self/ns/net").open() as own, Path("/run/netns", self._names[rank]).open() as machine:
            _enter(machine)
            try:
                yield
            finally:
                _enter(own)

    def connect(self) -> None:
        ip("netns", "add", self._switch)
        ip("-n", self._switch, "link", "add", "bridge", "up", "type", "bridge")
        for rank, (name, address) in enumerate(zip(self._names, self.addresses, strict=True)):
            ip("netns", "add", name)
            port = ["peer", "name", f"port{rank}", "netns", self._switch]
            ip("link", "add", "eth0", "netns", name, "type", "veth", *port)
            ip("-n", self._switch, "link", "set", f"port{rank}", "master", "bridge", "up")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "eth0", "up")

    def pull(self) -> None:
        """Cut the connection of the second machine."""
        ip("-n", self._names[1], "link", "set", "eth0", "down")

    def plug_in(self) -> None:
        """Restore the connection."""
        ip("-n", self._names[1], "link", "set", "eth0", "up")

    def remove(self) -> None:
        for name in (*self._names, self._switch):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def _enter(namespace: IO[str]) -> None:
    # Python has os.setns from 3.12 on.
    if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextmanager
def cable(machines: int = 2) -> Iterator[Cable]:
    """Create machines for a block. Their processes must have ended at its end."""
    cable = Cable(machines)
    try:
        cable.connect()
        yield cable
    finally:
        cable.remove()
