"""CORS headers as vLLM sends them, for answers that do not come from vLLM. Browsers hide answers without them."""

import argparse
import json

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware

from worker.errors import ConfigurationError
from worker.request.asgi import App, Message, Send
from worker.settings import Settings, flags


def middleware(app: App, settings: Settings) -> CORSMiddleware:
    """Return vLLM's middleware with vLLM's flags: `ALLOWED_ORIGINS`, `ALLOWED_METHODS` and so on."""
    args = _arguments(settings)
    return CORSMiddleware(
        app,
        allow_origins=args.allowed_origins,
        allow_methods=args.allowed_methods,
        allow_headers=args.allowed_headers,
        allow_credentials=args.allow_credentials,
    )


async def send_start(cors: CORSMiddleware, scope: Message, message: Message, send: Send) -> None:
    """Send the start of a response to the request in `scope`, with CORS headers unless vLLM has added them."""
    if any(name == b"vary" for name, _ in message["headers"]):
        await send(message)
    else:
        await cors.send(message, send, Headers(raw=scope["headers"]))


def _arguments(settings: Settings) -> argparse.Namespace:
    """Read the flags from the settings, because these answers are needed before vLLM is imported."""
    parser = argparse.ArgumentParser(exit_on_error=False, add_help=False, allow_abbrev=False)
    for name, default in {"origins": [], "methods": ["*"], "headers": ["*"]}.items():
        parser.add_argument(f"--allowed-{name}", f"--allowed_{name}", type=json.loads, default=default)
    parser.add_argument("--allow-credentials", "--allow_credentials", action=argparse.BooleanOptionalAction)
    try:
        return parser.parse_known_args(flags.arguments(settings.variables.values, parser))[0]
    except (ConfigurationError, argparse.ArgumentError):
        # `parse_arguments` reports the mistake.
        return parser.parse_args([])
