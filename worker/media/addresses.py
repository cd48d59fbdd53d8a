"""Which IP addresses and hosts belong to the public internet. Pure: names are not resolved."""

import ipaddress
import socket

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Ranges that Python's `ipaddress` treats as global although they are not for everybody, or that embed an IPv4 address.
_NOT_PUBLIC: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = (
    *map(ipaddress.IPv4Network, ("168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24")),
    *map(ipaddress.IPv6Network, ("64:ff9b:1::/48", "5f00::/16", "fec0::/10", "3fff::/20")),
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")


def is_public(text: str) -> bool:
    """Tell whether `text` is a public IP address, as must be every IPv4 address that is embedded in it."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return all(map(_is_global, _with_embedded(address)))


def _is_global(address: _Address) -> bool:
    special = not address.is_global or address.is_multicast or address.is_reserved or address.is_unspecified
    return not special and not any(address in network for network in _NOT_PUBLIC)


def may_be_public(host: str) -> bool:
    """Return False for localhost and for an IP address that is not public, True for any other host."""
    name = host.strip("[]").rstrip(".").lower()
    try:
        # This reads IP addresses in every notation of C libraries, such as `127.1`, and fails for names.
        addresses = socket.getaddrinfo(name.partition("%")[0], None, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return name != "localhost" and not name.endswith(".localhost")
    return is_public(str(addresses[0][4][0]))


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
