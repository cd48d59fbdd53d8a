"""The playground, a page to try the model: playground.html and headers that keep it from contacting any other host."""

import base64
import hashlib
import html
import re
from pathlib import Path

from starlette.responses import HTMLResponse

from worker.request.asgi import App

PAGE = Path(__file__).with_suffix(".html")
API = b"{{ api }}"
"""The placeholder in the page for the path of the API."""

POLICY = (
    "default-src 'none'",
    "connect-src 'self'",
    "img-src data: blob:",
    "media-src data: blob:",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
)


def app(api: str) -> App:
    """Return an ASGI app that answers with the page."""
    body, headers = page(api)
    return HTMLResponse(body, headers=headers)


def page(api: str) -> tuple[bytes, dict[str, str]]:
    """Return the page and its headers. `api` is the path from `/` to the OpenAI routes."""
    body = PAGE.read_bytes()
    policy = [*POLICY, *(f"{tag}-src {' '.join(_hashes(body, tag))}" for tag in ("script", "style"))]
    headers = {
        "content-security-policy": "; ".join(policy),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
    }
    return body.replace(API, html.escape(api).encode()), headers


def _hashes(body: bytes, tag: str) -> list[str]:
    """Return the policy's hashes of the inline scripts or styles; the browser accepts no others."""
    inline = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), body, re.DOTALL)
    return [f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in inline]
