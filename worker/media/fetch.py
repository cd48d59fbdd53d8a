"""Fetches links, and uploads to them. Links are untrusted, and the worker is inside a private network.

Only public addresses are connected to. A name is resolved once, every address is checked, and the connection uses the
checked addresses. Every redirect is checked as a new link. Proxies and credentials of the environment are not used.
"""

import asyncio
import io
import ipaddress
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Self

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import AsyncResolver
from yarl import URL

from worker.errors import LinkServerRefusedError, MediaError, RefusedLinkError, TooSlowError, UnreachableError
from worker.media.addresses import is_public, may_be_public
from worker.media.checks import Limit, check_size
from worker.settings.settings import Settings

REDIRECTS = (301, 302, 303, 307, 308)
UPLOAD_REDIRECTS = (307, 308)
"""Redirects that keep the method and the body."""
MAX_REDIRECTS = 3
CHUNK_BYTES = 1 << 16
SILENT_SECONDS = 60.0
"""How long a transfer of a large file may move no byte."""
NO_LIMIT = aiohttp.ClientTimeout(total=None)
"""For requests whose callers limit the time."""
KEEP_SECONDS = 2.0
"""How long an idle connection may be used again. One that has been idle for longer may have died while the worker was
frozen, and the fetch would wait for it until its time is over."""
HOST_CONNECTIONS = 32
"""How many connections to one host are open at once, for all requests."""

Reserve = Callable[[int], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Policy:
    """Which links may be fetched, and for how long."""

    seconds: float = 20.0
    """The limit for one fetch, including its redirects."""
    domains: tuple[tuple[str, ...], ...] = ()
    """Lists of allowed hosts. A host must be on every list; `*.example.org` matches all names below example.org."""
    ports: tuple[int, ...] = (80, 443, 8080, 8443)
    private_networks: bool = False
    """Allow every address and every port."""

    @classmethod
    def of(cls, settings: Settings, domains: Iterable[str] | None = None) -> Self:
        """Return the policy of the settings. `domains` is vLLM's own list of allowed hosts."""
        return cls(
            seconds=settings.media_fetch_timeout,
            domains=tuple(filter(None, (settings.media_allowed_domains, tuple(domains or ())))),
            ports=settings.media_allowed_ports,
            private_networks=settings.media_allow_private_networks,
        )

    def check(self, url: URL) -> None:
        """Raise `RefusedLinkError` if a link is not allowed. Its host is not resolved."""
        if url.scheme not in ("http", "https") or not url.host:
            raise RefusedLinkError(
                "only https:, http:, data: and file: links are accepted; for s3: and the like, presign an https: link"
            )
        if url.user is not None or url.password is not None:
            raise RefusedLinkError("a link must not contain a user name or password")
        for patterns in self.domains:
            if not any(_matches(url.host, pattern) for pattern in patterns):
                raise RefusedLinkError(f"the link's host is not in MEDIA_ALLOWED_DOMAINS={','.join(patterns)}")
        if "%" in url.host.partition("%25")[0]:
            raise RefusedLinkError("the link's host is malformed")
        if self.private_networks:
            return
        if url.port not in self.ports:
            raise RefusedLinkError(f"the link's port is not in MEDIA_ALLOWED_PORTS={','.join(map(str, self.ports))}")
        if not may_be_public(url.host):
            raise RefusedLinkError("the link does not lead to a public address")


def _matches(host: str, pattern: str) -> bool:
    host, pattern = host.rstrip(".").lower(), pattern.rstrip(".").lower()
    return host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern


def _parse(link: str) -> URL:
    """Parse a link. Its escapes are kept, since a signature may cover them, unless the link is not valid as written."""
    try:
        url = URL(link)
        exact = URL(link, encoded=True)
    except IndexError:
        # yarl 1.x raises it for `http://[x]@/`.
        raise ValueError("brackets in the wrong place") from None
    if exact.raw_authority.startswith("["):
        # Only the addresses of IPv6 may be in brackets. This raises ValueError for everything else.
        ipaddress.IPv6Address((exact.host or "").partition("%")[0])
    is_exact = link.isascii() and link.isprintable() and " " not in link
    return exact if is_exact and exact.host == url.host else url


class GuardedResolver(AbstractResolver):
    """Resolves names that have public addresses only. A name with public and private addresses is suspicious."""

    def __init__(self, policy: Policy, resolver: AbstractResolver) -> None:
        self._policy = policy
        self._resolver = resolver

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the addresses of a name; raise `RefusedLinkError` if one of them is not public."""
        results = await self._resolver.resolve(host, port, family)
        if not self._policy.private_networks and not all(is_public(result["host"]) for result in results):
            raise RefusedLinkError("the link does not lead to a public address")
        return results

    async def close(self) -> None:
        """Close the underlying resolver."""
        await self._resolver.close()


class Fetcher:
    """Fetches links over pooled connections. Create and use it in the same event loop."""

    def __init__(self, policy: Policy, resolver: AbstractResolver | None = None) -> None:
        self._policy = policy
        # Names are resolved without threads: a name server that is silent holds up nobody else.
        self._resolver = resolver or AsyncResolver()

    async def get(self, link: str, limit: Limit, reserve: Reserve) -> bytes:
        """Return the file at a link, decompressed, of at most `limit` bytes. `reserve` waits for memory.

        Raises:
            MediaError: the link is not allowed, or the fetch failed.
            JobError: there is no memory for the file.
        """
        seconds = self._policy.seconds
        with _as_media_errors(f"the link was not fetched within MEDIA_FETCH_TIMEOUT={seconds:g} s"):
            async with asyncio.timeout(seconds) as clock:

                async def reserve_untimed(size: int) -> None:
                    """Stop the clock while waiting for memory, which is not the link's fault."""
                    left = (clock.when() or 0) - asyncio.get_running_loop().time()
                    clock.reschedule(None)
                    await reserve(size)
                    clock.reschedule(asyncio.get_running_loop().time() + left)

                async with self._request("GET", link, REDIRECTS) as response:
                    return await _read_body(response, limit, reserve_untimed)

    async def pieces(self, link: str, limit: Limit, silent: float = SILENT_SECONDS) -> AsyncGenerator[bytes, None]:
        """Yield the file at a link as `get` does, but limit only its size and the seconds without a byte.

        Raises:
            MediaError: the link is not allowed, or the fetch failed.
        """
        with _as_media_errors(f"the link's server sent nothing for {silent:g} s"):
            times = aiohttp.ClientTimeout(total=None, sock_connect=silent, sock_read=silent)
            async with self._request("GET", link, REDIRECTS, times=times) as response:
                _check_status(response)
                check_size(response.content_length or 0, limit)
                size = 0
                async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                    size += len(chunk)
                    check_size(size, limit)
                    yield chunk

    async def put(
        self, link: str, data: bytes | Path, headers: Mapping[str, str], redirects: Iterable[int] = UPLOAD_REDIRECTS
    ) -> None:
        """Upload data, or a file, to a link with the method PUT. Redirects with these statuses are followed.

        The caller limits the time.

        Raises:
            MediaError: the link is not allowed, or its server has not accepted the data.
        """
        with _as_media_errors("the link's server did not answer in time"):
            async with self._request("PUT", link, redirects, data, headers) as response:
                _check_status(response)

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        link: str,
        redirects: Iterable[int],
        data: bytes | Path | None = None,
        headers: Mapping[str, str] | None = None,
        times: aiohttp.ClientTimeout = NO_LIMIT,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request, follow redirects with these statuses, and return the response."""
        url = _parse(link)
        for _ in range(MAX_REDIRECTS + 1):
            self._policy.check(url)
            async with self._session.request(
                method,
                url,
                data=_opened(data),
                headers=headers,
                skip_auto_headers=("Content-Type",),
                allow_redirects=False,
                timeout=times,
            ) as response:
                if response.status not in redirects:
                    yield response
                    return
                location = response.headers.get("location")
            if not location:
                raise UnreachableError("the link's server sent a redirect without a location")
            url = url.join(_parse(location))
        raise MediaError(f"the link redirects more than {MAX_REDIRECTS} times")

    @cached_property
    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=GuardedResolver(self._policy, self._resolver),
                limit=0,
                limit_per_host=HOST_CONNECTIONS,
                keepalive_timeout=KEEP_SECONDS,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": "runpod-vllm-worker", "Accept": "*/*"},
            trust_env=False,
        )

    async def aclose(self) -> None:
        """Close the connections and the resolver."""
        await self._session.close()
        await self._resolver.close()


def _opened(data: bytes | Path | None) -> BinaryIO | None:
    """Return data as a file, which aiohttp sends in pieces and closes. Bytes at once would hold up other requests."""
    return data.open("rb") if isinstance(data, Path) else None if data is None else io.BytesIO(data)


@contextmanager
def _as_media_errors(too_slow: str) -> Iterator[None]:
    """Raise the errors of a request as `MediaError`."""
    try:
        yield
    except TimeoutError:
        raise TooSlowError(too_slow) from None
    except MediaError:
        raise
    except aiohttp.ClientPayloadError:
        raise UnreachableError("the link's server sent an incomplete or corrupt response") from None
    except (aiohttp.ClientError, OSError) as error:
        # aiohttp wraps the error that `GuardedResolver` raises.
        if isinstance(refusal := error.__cause__ or error.__context__, MediaError):
            raise refusal from None
        raise UnreachableError("the link's server cannot be reached") from None
    except ValueError:
        raise MediaError("the link is not a valid URL") from None


def _check_status(response: aiohttp.ClientResponse) -> None:
    """Raise `MediaError` unless the server has accepted a request."""
    if response.status >= 500 or response.status in (408, 429):
        raise UnreachableError(f"the link's server answered with HTTP status {response.status}")
    if response.status >= 300:
        raise LinkServerRefusedError(f"the link's server answered with HTTP status {response.status}")


async def _read_body(response: aiohttp.ClientResponse, limit: Limit, reserve: Reserve) -> bytes:
    _check_status(response)
    check_size(response.content_length or 0, limit)
    body = bytearray()
    try:
        async for chunk in response.content.iter_chunked(CHUNK_BYTES):
            await reserve(len(chunk))
            body += chunk
            check_size(len(body), limit)
        return bytes(body)
    finally:
        # An exception keeps its traceback, which would keep the body until the whole request ends.
        body.clear()
