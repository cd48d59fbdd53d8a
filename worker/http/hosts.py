"""The host names by which callers may address the worker: a check against DNS rebinding. Pure.

A web page can make its own host name point to a loopback address, and then read what a worker answers there. A key
prevents it. So does this check, because browsers send the page's host name.
"""

import ipaddress
import re

from worker.settings import Settings


def allowed(settings: Settings) -> set[str]:
    """Return the only allowed names; empty if all are allowed, because of a key or a public address."""
    try:
        is_local = settings.host == "localhost" or ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        is_local = False
    return {name(host) for host in settings.allowed_hosts} if is_local and not settings.worker_api_key else set()


def name(host: str) -> str:
    """Return the name in a Host header: without port and brackets, in lower case."""
    return re.sub(r"(?<=[^:]):\d*$", "", host).strip("[]").lower()
