"""Fetching links from a local server that records every request, so that forbidden requests are noticed."""

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from tests.support.links import Server
from tests.support.local_server import Hello, LocalServer
from tests.support.proxy import Proxy
from worker.errors import (
    LinkServerRefusedError,
    MediaError,
    MediaTooLargeError,
    RefusedLinkError,
    TooSlowError,
    UnreachableError,
)
from worker.media import fetch as fetch_module
from worker.media.addresses import is_public
from worker.media.checks import Limit
from worker.media.fetch import KEEP_SECONDS, Fetcher, Policy

LIMIT = Limit("MAX_IMAGE_BYTES", 1_000_000)
OPEN = Policy(seconds=10, private_networks=True)


async def unlimited(_size: int) -> None:
    """Memory that is never short."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


class FixedResolver(AbstractResolver):
    """Resolves every name to the same addresses."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, _family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        families = {True: socket.AF_INET6, False: socket.AF_INET}
        return [
            ResolveResult(hostname=host, host=address, port=port, family=families[":" in address], proto=0, flags=0)
            for address in self.addresses
        ]

    async def close(self) -> None:
        """There is nothing to close."""


class PublicExampleResolver(FixedResolver):
    """Resolves `public.example` to the given addresses, and every other name as usual."""

    async def resolve(self, host: str, *arguments: Any, **options: Any) -> list[ResolveResult]:
        if host == "public.example":
            return await super().resolve(host, *arguments, **options)
        return await ThreadedResolver().resolve(host, *arguments, **options)


def fetch(link: str, policy: Policy = OPEN, resolver: FixedResolver | None = None) -> bytes:
    async def run() -> bytes:
        fetcher = Fetcher(policy, resolver)
        try:
            return await fetcher.get(link, LIMIT, unlimited)
        finally:
            await fetcher.aclose()

    return asyncio.run(run())


def test_a_fetch_returns_the_content_and_sends_no_credentials(server: Server) -> None:
    assert fetch(f"{server.url}/picture.png?a=1&b=%2F") == b"hello"
    assert server.hits == ["/picture.png?a=1&b=%2F"]
    assert {"authorization", "cookie", "proxy-authorization"}.isdisjoint(server.headers)


def test_at_most_three_redirects_are_followed(server: Server) -> None:
    chain = "/redirect/" * 3 + "/end"
    assert fetch(server.url + chain) == b"hello"
    assert len(server.hits) == 4
    with pytest.raises(MediaError, match="redirects more than 3 times"):
        fetch(f"{server.url}/loop/")


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        pytest.param("/status/404", LinkServerRefusedError, "HTTP status 404", id="404"),
        pytest.param("/status/403", LinkServerRefusedError, "HTTP status 403", id="403"),
        pytest.param("/status/429", UnreachableError, "HTTP status 429", id="429"),
        pytest.param("/status/500", UnreachableError, "HTTP status 500", id="500"),
        pytest.param("/endless/", MediaTooLargeError, "MAX_IMAGE_BYTES=1000000", id="endless"),
        pytest.param("/packed/", MediaTooLargeError, "MAX_IMAGE_BYTES=1000000", id="large once decompressed"),
        pytest.param("/broken/", UnreachableError, "incomplete or corrupt", id="incomplete"),
        pytest.param("/redirect/ftp://example.org/x", RefusedLinkError, "only https:, http:", id="redirect to ftp"),
        pytest.param("/redirect/file:///etc/passwd", RefusedLinkError, "only https:, http:", id="redirect to a file"),
        pytest.param("/redirect/http://u:p@example.org/", RefusedLinkError, "user name", id="redirect with a password"),
    ],
)
def test_a_failed_fetch_is_explained(server: Server, path: str, error: type[MediaError], message: str) -> None:
    with pytest.raises(error, match=message):
        fetch(server.url + path)


def test_the_timeout_covers_the_whole_fetch(server: Server) -> None:
    with pytest.raises(TooSlowError, match=r"MEDIA_FETCH_TIMEOUT=0\.3 s"):
        fetch(f"{server.url}/drip/", Policy(seconds=0.3, private_networks=True))


def test_a_server_that_does_not_listen_is_unreachable() -> None:
    with pytest.raises(UnreachableError, match="cannot be reached"):
        fetch("http://127.0.0.1:9/x")


def test_proxies_of_the_environment_are_not_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert fetch(f"{server.url}/x") == b"hello"


LOOPBACK = (
    "127.0.0.1 127.1 127.0.1 0x7f.0.0.1 0x7f000001 2130706433 017700000001 0177.0.0.1 127.0.0.1. 127.255.255.254 "
    "[::1] [0:0:0:0:0:0:0:1] [::ffff:127.0.0.1] [::ffff:7f00:1] [::127.0.0.1] [64:ff9b::127.0.0.1] [2002:7f00:1::] "
    "0.0.0.0 0 [::] localhost LOCALHOST localhost. ①②⑦.⓪.⓪.① 127。0。0。1 １２７.0.0.1"
).split()
PRIVATE = (
    "169.254.169.254 169.254.169.254. 0xa9fea9fe 2852039166 0251.0376.0251.0376 169.254.43518 [::ffff:169.254.169.254] "
    "[::ffff:a9fe:a9fe] [64:ff9b::a9fe:a9fe] [2002:a9fe:a9fe::] [fe80::1] [fe80::1%25eth0] [fd00:ec2::254] "
    "168.63.129.16 0xa83f8110 [::ffff:168.63.129.16] 10.0.0.1 172.16.0.1 172.31.255.255 192.168.0.1 100.64.0.1 "
    "100.127.255.255 198.18.0.1 192.0.0.8 192.0.2.1 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.255 240.0.0.1 "
    "255.255.255.255 [fc00::1] [ff02::1] [2001:db8::1] [64:ff9b:1::1] [2001:0:7f00:1::] [2001:0:4136:e378::80ff:fffe] "
    "[fec0::1] [3fff::1] [2606:4700::5efe:10.0.0.1] [2606:4700::200:5efe:a00:1]"
).split()


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("host", [*LOOPBACK, *PRIVATE])
def test_private_addresses_are_never_contacted(server: Server, scheme: str, host: str) -> None:
    for port in ("", ":80", f":{server.server_port}"):
        began = time.monotonic()
        with pytest.raises(RefusedLinkError):
            fetch(f"{scheme}://{host}{port}/x", Policy(seconds=1, ports=(80, 443, server.server_port)))
        assert time.monotonic() - began < 1
    assert server.hits == []


@pytest.mark.parametrize("host", [host for host in (*LOOPBACK, *PRIVATE) if host.isascii()])
def test_redirects_to_private_addresses_are_refused(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """127.7.7.7, where the redirects come from, is treated as a public address."""
    monkeypatch.setattr(fetch_module, "is_public", lambda address: address == "127.7.7.7" or is_public(address))
    with Server("127.7.7.7") as public, Server("0.0.0.0") as private:
        policy = Policy(seconds=5, ports=(80, 443, public.server_port, private.server_port))
        resolver = PublicExampleResolver("127.7.7.7")
        start = f"http://public.example:{public.server_port}/redirect/"
        target = f"//{host}:{private.server_port}/x"
        for link in (f"http:{target}", f"https:{target}", target, f"/redirect/http:{target}", f"http://{host}/x"):
            began = time.monotonic()
            with pytest.raises(RefusedLinkError):
                fetch(start + link, policy, resolver)
            assert time.monotonic() - began < 1
        assert len(public.hits) == 6
        assert private.hits == []


@pytest.mark.parametrize(
    "link",
    [
        "",
        "example.org/x.png",
        "ftp://example.org/x",
        "file:///etc/passwd",
        "gopher://example.org/",
        "http://",
        "http:///x",
        "http://user@example.org/",
        "http://:password@example.org/",
        "http://example.org@127.0.0.1/",
        "http://127.0.0.1#@example.org/",
        "http://127.0.0.1\\@example.org/",
        "http://example.org:22/",
        "http://example.org:6379/",
        "https://example.org:8081/",
        "http://example.org:99999/",
        "http://example.org:x/",
        "http://[::1/",
        "http://exa mple.org/",
        "http://example.org\r\nHost: x/",
        "http://\x00/",
        "unix:///var/run/docker.sock",
        "jar:http://example.org!/",
        "http://%31%32%37.0.0.1/",
        "http://127%2e0%2e0%2e1/",
        "http://example.org%00.evil.example/",
    ],
)
def test_malformed_and_forbidden_links_are_refused_without_a_request(server: Server, link: str) -> None:
    began = time.monotonic()
    with pytest.raises(MediaError) as caught:
        fetch(link, Policy(seconds=5), resolver=FixedResolver("127.0.0.1"))
    assert caught.value.status in (400, 403)
    assert time.monotonic() - began < 1
    assert server.hits == []


@pytest.mark.parametrize(
    "addresses",
    [
        pytest.param(["127.0.0.1"], id="loopback"),
        pytest.param(["169.254.169.254"], id="metadata"),
        pytest.param(["93.184.215.14", "10.0.0.1"], id="one of two"),
        pytest.param(["::ffff:10.0.0.1"], id="mapped"),
    ],
)
def test_a_name_with_a_private_address_is_refused(addresses: list[str]) -> None:
    with pytest.raises(RefusedLinkError, match="public address") as caught:
        fetch("http://innocent.example/x", Policy(seconds=5), resolver=FixedResolver(*addresses))
    assert not any(address in str(caught.value) for address in addresses)


def test_a_name_is_resolved_only_once_so_that_dns_rebinding_fails(server: Server) -> None:
    class Rebinding(FixedResolver):
        calls = 0

        async def resolve(self, *args: Any, **options: Any) -> list[ResolveResult]:
            self.calls += 1
            self.addresses = ("192.0.2.1",) if self.calls > 1 else ("127.0.0.1",)
            return await super().resolve(*args, **options)

    resolver = Rebinding()
    assert fetch(f"http://name.example:{server.server_port}/redirect//x", OPEN, resolver=resolver) == b"hello"
    assert resolver.calls == 1


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("cdn.example.org", True),
        ("a.b.example.org", True),
        ("CDN.EXAMPLE.ORG.", True),
        ("example.org", False),
        ("evil-example.org", False),
        ("example.org.evil.net", False),
        ("other.net", True),
        ("sub.other.net", False),
    ],
)
def test_only_allowed_domains_are_fetched_from(host: str, allowed: bool) -> None:
    policy = Policy(seconds=1, domains=(("*.example.org", "other.net"),))
    with pytest.raises(RefusedLinkError) as caught:
        fetch(f"http://{host}/x", policy, resolver=FixedResolver("127.0.0.1"))
    assert ("MEDIA_ALLOWED_DOMAINS" in str(caught.value)) is not allowed


def test_a_fetch_can_be_cancelled(server: Server) -> None:
    async def run() -> None:
        fetcher = Fetcher(OPEN)
        task = asyncio.create_task(fetcher.get(f"{server.url}/drip/", LIMIT, unlimited))
        while not server.hits:  # noqa: ASYNC110 - the server is in a thread
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await fetcher.aclose()

    asyncio.run(run())


def test_memory_is_reserved_for_what_has_arrived(server: Server) -> None:
    reserved: list[int] = []

    async def reserve(size: int) -> None:
        reserved.append(size)

    async def run() -> int:
        fetcher = Fetcher(OPEN)
        try:
            return len(await fetcher.get(f"{server.url}/image", LIMIT, reserve))
        finally:
            await fetcher.aclose()

    assert asyncio.run(run()) == sum(reserved) > 0


@pytest.mark.parametrize(
    "link", ["http://[a:b.example]/", "http://[x]@/", "http://[v1.a]/", "http://[x]/", "http://a[b]/"]
)
def test_brackets_around_anything_but_an_address(link: str) -> None:
    with pytest.raises(MediaError, match="not a valid URL"):
        fetch(link, Policy())


class SilentResolver(FixedResolver):
    """Never answers for `silent.example`."""

    async def resolve(self, host: str, *arguments: Any, **options: Any) -> list[ResolveResult]:
        if host == "silent.example":
            await asyncio.Event().wait()
        return await super().resolve(host, *arguments, **options)


def test_links_whose_name_server_is_silent_hold_up_nobody_else(server: Server) -> None:
    async def run() -> bytes:
        fetcher = Fetcher(OPEN, SilentResolver("127.0.0.1"))
        silent = [
            asyncio.create_task(fetcher.get(f"http://silent.example/{number}", LIMIT, unlimited))
            for number in range(200)
        ]
        try:
            async with asyncio.timeout(5):
                return await fetcher.get(f"{server.url}/image", LIMIT, unlimited)
        finally:
            for task in silent:
                task.cancel()
            await asyncio.gather(*silent, return_exceptions=True)
            await fetcher.aclose()

    assert asyncio.run(run())


def test_few_connections_to_one_host_are_open_at_once(server: Server) -> None:
    async def run() -> list[bytes]:
        fetcher = Fetcher(OPEN)
        links = [f"{server.url}/slow/0.05?{number}" for number in range(100)]
        try:
            return await asyncio.gather(*(fetcher.get(link, LIMIT, unlimited) for link in links))
        finally:
            await fetcher.aclose()

    assert len(asyncio.run(run())) == 100
    assert server.most_connections <= fetch_module.HOST_CONNECTIONS


def test_the_resolver_is_closed_with_the_fetcher(server: Server) -> None:
    closed: list[bool] = []

    class ClosingResolver(FixedResolver):
        async def close(self) -> None:
            closed.append(True)

    fetch(f"{server.url}/image", resolver=ClosingResolver("127.0.0.1"))
    assert closed == [True]


def in_pieces(link: str, limit: float, silent: float = 5.0) -> int:
    """Fetch a file in pieces, and return its size."""

    async def run() -> int:
        async with aclosing(Fetcher(OPEN)) as fetcher:
            return sum([len(piece) async for piece in fetcher.pieces(link, Limit("MAX_BATCH_BYTES", limit), silent)])

    return asyncio.run(run())


def test_a_large_file_comes_in_pieces(server: Server) -> None:
    assert in_pieces(f"{server.url}/packed", 10_000_000) == 10_000_000


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        pytest.param("packed", MediaTooLargeError, "MAX_BATCH_BYTES=1000000", id="too large when decompressed"),
        pytest.param("endless", MediaTooLargeError, "MAX_BATCH_BYTES=1000000", id="endless"),
        pytest.param("broken", UnreachableError, "incomplete or corrupt", id="incomplete"),
        pytest.param("status/404", LinkServerRefusedError, "HTTP status 404", id="missing"),
        pytest.param("slow/3", TooSlowError, "sent nothing for 0.5 s", id="silent"),
    ],
)
def test_a_large_file_that_cannot_be_fetched(server: Server, path: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        in_pieces(f"{server.url}/{path}", 1_000_000, 0.5)


def test_a_slow_file_is_not_limited_in_time(server: Server) -> None:
    with pytest.raises(MediaTooLargeError):
        # Each of its bytes comes after 0.05 s.
        in_pieces(f"{server.url}/drip", 20, 0.5)


def test_a_file_is_uploaded_with_its_length(server: Server, tmp_path: Path) -> None:
    (file := tmp_path / "file").write_bytes(b"x" * 3_000_000)

    async def run() -> None:
        async with aclosing(Fetcher(OPEN)) as fetcher:
            await fetcher.put(f"{server.url}/up", file, {})

    asyncio.run(run())
    assert server.hits[-1] == "/up"


def test_a_connection_that_was_idle_for_long_is_not_used_again() -> None:
    """It may have died while the worker was frozen."""

    async def run(proxy: Proxy) -> None:
        async with aclosing(Fetcher(OPEN)) as fetcher:

            async def get() -> bytes:
                return await fetcher.get(f"http://127.0.0.1:{proxy.port}/", LIMIT, unlimited)

            assert await get() == await get() == b"hello"
            assert proxy.opened == 1
            proxy.lose_connections()
            await asyncio.sleep(KEEP_SECONDS + 0.1)
            async with asyncio.timeout(10):
                assert await get() == b"hello"
        assert proxy.opened == 2

    with LocalServer(Hello) as server, Proxy(server.server_port) as proxy:
        asyncio.run(run(proxy))
