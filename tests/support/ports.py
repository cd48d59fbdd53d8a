"""Ports for what listens in tests and benchmarks."""

import socket


def free_port() -> int:
    """Return a port of loopback at which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
