"""Which IP addresses and hosts belong to the public internet. Pure: names are not resolved."""

import ipaddress
import socket

from runpod.serverless.utils.rp_ssrf import is_safe_address

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Ranges that the SDK's check treats as public although they are not, or that embed an IPv4 address.
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        ("168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24", "64:ff9b:1::/48", "5f00::/16", "fec0::/10", "3fff::/20"),
    )
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")


def is_public(text: str) -> bool:
    """Tell whether `text` is a public IP address, as must be every IPv4 address that is embedded in it."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return all(
        is_safe_address(str(part)) and not any(part in net for net in _NOT_PUBLIC if net.version == part.version)
        for part in _with_embedded(address)
    )


def may_be_public(host: str) -> bool:
    """Return False for localhost and for an IP address that is not public, True for any other host."""
    name = host.rstrip(".").lower()
    address = _parse_address(host)
    return name != "localhost" and not name.endswith(".localhost") and (address is None or is_public(address))


def _with_embedded(address: _Address) -> list[_Address]:
    """Return an address and the IPv4 addresses embedded in it; only the latter if it merely stands for one."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    low = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address in _NAT64:
        return [low]
    isatap = int(address) >> 32 & 0xFDFFFFFF == 0x00005EFE
    embedded = [address.sixtofour, *(address.teredo or ()), low if isatap or address in _COMPATIBLE else None]
    return [address, *(part for part in embedded if part is not None)]


def _parse_address(host: str) -> str | None:
    """Return the IP address that a host is, in any notation that C libraries read (`127.1`), or None for a name."""
    host = host.strip("[]").rstrip(".")
    try:
        return str(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except (OSError, UnicodeEncodeError):
        return None
