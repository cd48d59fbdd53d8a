"""The routes that callers may use, in every mode. Pure."""

import re
from typing import Literal

Method = Literal["GET", "POST"]

ROUTES: dict[str, Method] = {
    "/v1/chat/completions": "POST",
    "/v1/chat/completions/batch": "POST",
    "/v1/chat/completions/render": "POST",
    "/v1/chat/completions/derender": "POST",
    "/v1/completions": "POST",
    "/v1/completions/render": "POST",
    "/v1/completions/derender": "POST",
    "/v1/responses": "POST",
    "/v1/responses/render": "POST",
    "/v1/responses/{id}": "GET",
    "/v1/responses/{id}/cancel": "POST",
    "/v1/messages": "POST",
    "/v1/messages/render": "POST",
    "/v1/messages/count_tokens": "POST",
    "/v1/embeddings": "POST",
    "/v1/score": "POST",
    "/v1/rerank": "POST",
    "/v2/embed": "POST",
    "/v2/rerank": "POST",
    "/classify": "POST",
    "/pooling": "POST",
    "/score": "POST",
    "/rerank": "POST",
    "/v1/systemone": "POST",
    "/v1/audio/transcriptions": "POST",
    "/v1/audio/translations": "POST",
    "/v1/models": "GET",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/version": "GET",
}
"""The engine's inference routes; `{id}` is one path segment. All other routes of the engine are control routes."""

OWN_ROUTES = ("/ping", "/health", "/info", "/metrics")
"""The worker's own routes, all of them GET."""

CONTROL = "control"
"""The label of all other routes in metrics."""

_PATTERNS = [(re.compile(re.sub(r"\{id\}", "[^/]+", route)), route) for route in ROUTES]


def route_of(path: str) -> str | None:
    """Return the inference route of a path, or None."""
    return next((route for pattern, route in _PATTERNS if pattern.fullmatch(path)), None)


def method_of(path: str) -> Method | None:
    """Return the method of a path's inference route, or None."""
    route = route_of(path)
    return ROUTES[route] if route else None


def label_of(path: str) -> str:
    """Return the route of a path for metrics and logs, out of a bounded set."""
    return route_of(path) or (path if path in OWN_ROUTES else CONTROL)
