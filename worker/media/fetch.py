"""Fetches links to media on behalf of strangers, from inside a network that is not theirs.

Nothing but a public address is connected to: names are resolved once, every address is looked at, and the connection
goes to the address that was looked at. Each redirect is a new link. Nothing of the environment, neither proxies nor
credentials, goes along.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from runpod.serverless.utils.rp_ssrf import is_safe_address
from yarl import URL

from worker.errors import LinkServerRefusedError, MediaError, RefusedLinkError, TooSlowError, UnreachableError
from worker.media.checks import Limit, check_size

REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 3
CHUNK_BYTES = 1 << 16

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Ranges that the SDK's check takes for public, or that carry an IPv4 address within.
_REFUSED = tuple(
    map(
        ipaddress.ip_network,
        ("168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24", "64:ff9b:1::/48", "5f00::/16", "fec0::/10", "3fff::/20"),
    )
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")


@dataclass(frozen=True, slots=True)
class Policy:
    """What may be fetched."""

    seconds: float = 20.0
    """For all of a fetch, redirects included."""
    domains: tuple[tuple[str, ...], ...] = ()
    """Of each of these lists a host must be on; `*.example.org` stands for every name below example.org."""
    ports: tuple[int, ...] = (80, 443, 8080, 8443)
    private_networks: bool = False
    """Whether any address and port will do."""

    def check(self, url: URL) -> None:
        """Look at a link before anything is asked about it.

        Raises:
            RefusedLinkError: it is not to be fetched.
        """
        if url.scheme not in ("http", "https") or not url.host:
            raise RefusedLinkError(
                "only https:, http:, data: and file: links are taken; for s3: and the like, presign a https: link"
            )
        if url.user is not None or url.password is not None:
            raise RefusedLinkError("a link must hold no user name or password")
        for allowed in self.domains:
            if not any(_matches(url.host, pattern) for pattern in allowed):
                raise RefusedLinkError(f"the link's host is none of MEDIA_ALLOWED_DOMAINS={_listed(allowed)}")
        if "%" in url.host.partition("%25")[0]:
            raise RefusedLinkError("the link's host is malformed")
        if self.private_networks:
            return
        if url.port not in self.ports:
            raise RefusedLinkError(f"the link's port is none of MEDIA_ALLOWED_PORTS={_listed(self.ports)}")
        if _is_local(url.host) or ((address := _literal(url.host)) is not None and not is_public(address)):
            raise RefusedLinkError("the link does not lead to a public address")


def _listed(items: Iterable[object]) -> str:
    return ",".join(map(str, items))


def _parsed(link: str) -> URL:
    """Return a link as it is written, escapes included, which a signature may cover; an odd one is put right."""
    url = URL(link)
    if not (link.isascii() and link.isprintable() and " " not in link):
        return url
    exact = URL(link, encoded=True)
    return exact if exact.host == url.host else url


def is_public(text: str) -> bool:
    """Tell whether an IP address, and every IPv4 address that it carries, is one of the public internet."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return all(
        is_safe_address(str(one)) and not any(one in network for network in _REFUSED if network.version == one.version)
        for one in _unwrapped(address)
    )


def _unwrapped(address: Address) -> list[Address]:
    """Return an address with the IPv4 addresses that it carries, or only those where it is just a way to write one."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    low = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address in _NAT64:
        return [low]
    isatap = int(address) >> 32 & 0xFDFFFFFF == 0x00005EFE
    carried = [address.sixtofour, *(address.teredo or ()), low if isatap or address in _COMPATIBLE else None]
    return [address, *(one for one in carried if one is not None)]


def _is_local(host: str) -> bool:
    name = host.rstrip(".").lower()
    return name == "localhost" or name.endswith(".localhost")


def _literal(host: str) -> str | None:
    """Return the address that a host is, in whichever of the ways that C libraries read, or None for a name."""
    host = host.strip("[]").rstrip(".")
    try:
        return str(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except (OSError, UnicodeEncodeError):
        return None


def _matches(host: str, pattern: str) -> bool:
    host, pattern = host.rstrip(".").lower(), pattern.rstrip(".").lower()
    return host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern


class GuardedResolver(AbstractResolver):
    """Resolves a name, unless one of its addresses is not public: a name with both kinds is up to something."""

    def __init__(self, policy: Policy, resolver: AbstractResolver) -> None:
        self._policy = policy
        self._resolver = resolver

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the addresses of a name.

        Raises:
            RefusedLinkError: it has one that is not public.
        """
        found = await self._resolver.resolve(host, port, family)
        if not self._policy.private_networks and not all(is_public(one["host"]) for one in found):
            raise RefusedLinkError("the link does not lead to a public address")
        return found

    async def close(self) -> None:
        """Close the resolver."""
        await self._resolver.close()


class Fetcher:
    """Fetches links over pooled connections; to be used in one event loop."""

    def __init__(self, policy: Policy, resolver: AbstractResolver | None = None) -> None:
        self._policy = policy
        self._resolver = resolver
        self._session: aiohttp.ClientSession | None = None

    async def get(self, link: str, limit: Limit) -> bytes:
        """Return what is behind a link, unpacked if the server packed it.

        Raises:
            MediaError: it cannot or must not be fetched.
        """
        try:
            async with asyncio.timeout(self._policy.seconds):
                return await self._follow(_parsed(link), limit)
        except TimeoutError:
            raise TooSlowError(
                f"the link was not fetched within MEDIA_FETCH_TIMEOUT={self._policy.seconds:g} s"
            ) from None
        except MediaError:
            raise
        except aiohttp.ClientPayloadError:
            raise UnreachableError("the link's server broke off or sent what cannot be unpacked") from None
        except (aiohttp.ClientError, OSError) as error:
            # The resolver's refusal arrives within the connector's error.
            if isinstance(refused := error.__cause__ or error.__context__, MediaError):
                raise refused from None
            raise UnreachableError("the link's server cannot be reached") from None
        except ValueError:
            raise MediaError("the link is no URL") from None

    async def _follow(self, url: URL, limit: Limit) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            self._policy.check(url)
            async with self._client().get(url, allow_redirects=False) as answer:
                if answer.status not in REDIRECTS:
                    return await _body(answer, limit)
                location = answer.headers.get("location")
            if not location:
                raise UnreachableError("the link's server redirects to nowhere")
            url = url.join(_parsed(location))
        raise MediaError(f"the link redirects more than {MAX_REDIRECTS} times")

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            resolver = GuardedResolver(self._policy, self._resolver or ThreadedResolver())
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(resolver=resolver, limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": "runpod-vllm-worker", "Accept": "*/*"},
                trust_env=False,
            )
        return self._session

    async def aclose(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()


async def _body(answer: aiohttp.ClientResponse, limit: Limit) -> bytes:
    if answer.status >= 500 or answer.status in (408, 429):
        raise UnreachableError(f"the link's server answered with HTTP status {answer.status}")
    if answer.status >= 400:
        raise LinkServerRefusedError(f"the link's server answered with HTTP status {answer.status}")
    check_size(answer.content_length or 0, limit)
    body = bytearray()
    async for chunk in answer.content.iter_chunked(CHUNK_BYTES):
        body += chunk
        check_size(len(body), limit)
    return bytes(body)
