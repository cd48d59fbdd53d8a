"""The stand-in as an ASGI application: routing, API keys, injected faults and error replies."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

from worker.http.playground import page

from . import client_api, worker_api
from .behaviour import POSTS, RouteKind
from .openai_proxy import openai
from .platform import Platform, UnknownJobError
from .wire import (
    AsgiApp,
    CutReply,
    DisconnectedError,
    HttpError,
    LateReply,
    PlainReply,
    Receive,
    Reply,
    Request,
    Send,
    json_reply,
)

Handler: TypeAlias = Callable[[Platform, Request], Awaitable[Reply]]


@dataclass(frozen=True, slots=True)
class Route:
    handler: Handler
    methods: frozenset[str] = frozenset()
    """Accepted HTTP methods; empty accepts all."""
    kind: RouteKind | None = None
    """Set for the routes that workers call. Only these take faults, and they need no API key."""


async def playground(platform: Platform, _: Request) -> Reply:
    """The page for trying the model in a browser. RunPod has no such page."""
    body, headers = page(f"v2/{platform.endpoint}/openai/v1")
    return PlainReply(200, body, b"text/html; charset=utf-8", headers)


PLAYGROUND = "/"
GET, POST, BOTH = frozenset({"GET"}), frozenset({"POST"}), frozenset({"GET", "POST"})

ROUTES: Mapping[str, Route] = MappingProxyType(
    {
        "job-take": Route(worker_api.take_one, GET, "take"),
        "job-take-batch": Route(worker_api.take_batch, GET, "take"),
        "job-stop": Route(worker_api.stop, GET, "stop"),
        "job-stream": Route(worker_api.stream, POST, "stream"),
        "job-done": Route(worker_api.done, POST, "done"),
        "ping": Route(worker_api.ping, GET, "ping"),
        "run": Route(client_api.run, POST),
        "runsync": Route(client_api.runsync, POST),
        "status": Route(client_api.status, BOTH),
        "stream": Route(client_api.stream, BOTH),
        "cancel": Route(client_api.cancel, POST),
        "retry": Route(client_api.retry, POST),
        "purge-queue": Route(client_api.purge_queue, POST),
        "health": Route(client_api.health, GET),
        "openai": Route(openai),
        "records": Route(client_api.records, GET),
        PLAYGROUND: Route(playground, GET),
    }
)


def create_app(platform: Platform) -> AsgiApp:
    async def app(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        verb, path = _split(platform.endpoint, scope["path"])
        request = Request(scope, receive, path)
        try:
            reply = await _reply(platform, verb, request)
            delay = request.fault.answer_delay
            await (LateReply(reply, delay) if delay else reply).send(send)
        except DisconnectedError:
            return
        finally:
            request.close()

    return app


async def _reply(platform: Platform, verb: str, request: Request) -> Reply:
    try:
        route = _route(platform, verb, request)
        if route.kind is None:
            return await route.handler(platform, request)
        platform.requested(route.kind)
        if platform.behaviour.is_away:
            await request.reset()
        if route.kind in POSTS:
            platform.records.post_connections.add(request.client)
        request.fault = platform.behaviour.next_fault(route.kind)
        return await _with_fault(platform, route.handler, request)
    except UnknownJobError as error:
        return json_reply({"error": f"There is no job with the id {error}."}, 404)
    except HttpError as error:
        return json_reply({"error": error.reason}, error.status)
    except asyncio.CancelledError:
        # Only the server cancels a request, when it closes.
        return json_reply({"error": "The stand-in is closing."}, 503)


def _route(platform: Platform, verb: str, request: Request) -> Route:
    route = ROUTES.get(verb)
    if route is None:
        raise HttpError(404, f"There is no such route under /v2/{platform.endpoint}/. See standin/README.md.")
    if route.methods and request.method not in route.methods:
        raise HttpError(405, f"{request.method} is not allowed here. Use {' or '.join(sorted(route.methods))}.")
    key = platform.behaviour.api_key
    needs_key = route.kind is None and verb != PLAYGROUND
    if key is not None and needs_key and request.header(b"authorization") != f"Bearer {key}":
        raise HttpError(401, "The API key is missing or wrong. Send it as 'Authorization: Bearer KEY'.")
    return route


async def _with_fault(platform: Platform, handler: Handler, request: Request) -> Reply:
    fault = request.fault
    if fault.delay:
        await asyncio.sleep(fault.delay)
    if fault.cut:
        return CutReply(await handler(platform, request), request)
    if not fault.replaces_reply:
        return await handler(platform, request)
    if fault.handled:
        await handler(platform, request)
    else:
        await request.body()
    if fault.reset:
        await request.reset()
    return PlainReply(fault.status or 200, fault.body)


def _split(endpoint: str, path: str) -> tuple[str, str]:
    """Split `/v2/ENDPOINT/VERB/REST` into VERB and REST. The verb of `/` is `/`; the verb of other paths is empty."""
    if path == PLAYGROUND:
        return PLAYGROUND, ""
    prefix = f"/v2/{endpoint}/"
    verb, _, rest = path.removeprefix(prefix).partition("/")
    return (verb, rest) if path.startswith(prefix) else ("", "")
