"""Inputs behind links: `{"input_url": "https://…"}` stands for the JSON object that the link leads to."""

import json
import time
from collections.abc import Iterable
from contextlib import aclosing

from worker.errors import InvalidRequestError, JobError, Json, MediaError
from worker.media.checks import Limit
from worker.media.fetch import Fetcher, Policy, Reserve
from worker.memory import current_account
from worker.request.asgi import Message
from worker.request.rewrite import is_json, with_body
from worker.request.routes import route_of
from worker.request.shape import check_shape, parse
from worker.settings import Settings
from worker.telemetry.usage import Fetch, current_usage, rejected

INPUT_URL = "input_url"
BODIES = ("openai_input", "body")
"""The fields of a job's input that are the body of a request."""
MAX_LINK_BODY_BYTES = 10_000
"""The largest HTTP body that is searched for a link."""


class LinkedInputs:
    """Fetches inputs. Links are fetched under the same policy as those to media."""

    def __init__(self, policy: Policy, settings: Settings) -> None:
        self._policy = policy
        self._limit = Limit("MAX_REQUEST_BYTES", settings.max_request_bytes)

    async def resolve(self, job_input: Json, reserve: Reserve) -> Json:
        """Return a job's input with the content of its links. `reserve` waits for memory.

        Raises:
            JobError: the link cannot be fetched, or does not lead to an input.
        """
        if INPUT_URL in job_input:
            return _parsed(await self._fetch(job_input, reserve))
        linked = {name: _parsed(await self._fetch(job_input[name], reserve)) for name in _linked_bodies(job_input)}
        return {**job_input, **linked}

    async def rewrite(self, scope: Message, body: bytes) -> tuple[Message, bytes]:
        """Return an HTTP request with the body that its link leads to. Other requests stay as they are.

        Raises:
            JobError: the link cannot be fetched, or does not lead to a body.
        """
        if len(body) > MAX_LINK_BODY_BYTES or b'"input_url"' not in body:
            return scope, body
        if not (is_json(scope) and route_of(scope["path"])):
            return scope, body
        try:
            value = json.loads(body)
        except ValueError:
            return scope, body
        if not isinstance(value, dict) or INPUT_URL not in value:
            return scope, body
        # Every request of a caller has an account.
        account = current_account.get()
        assert account is not None
        data = await self._fetch(value, account.take)
        _parsed(data)
        return with_body(scope, data, "application/json")

    async def _fetch(self, holder: Json, reserve: Reserve) -> bytes:
        """Return what the link in `holder` leads to."""
        if beside := sorted(holder.keys() - {INPUT_URL}):
            raise InvalidRequestError(
                f"'input_url' stands for the whole input, so {beside[0][:100]!r} must not stand beside it. "
                "Put it into the file that the link leads to.",
                param=INPUT_URL,
            )
        if not isinstance(link := holder[INPUT_URL], str):
            raise InvalidRequestError("'input_url' must be a string: the link to the input.", param=INPUT_URL)
        began = time.monotonic()
        try:
            async with aclosing(Fetcher(self._policy)) as fetcher:
                data = await fetcher.get(link, self._limit, reserve)
        except MediaError as error:
            raise rejected(type(error)(f"'input_url': {error}.", param=INPUT_URL)) from None
        if (usage := current_usage.get()) is not None:
            usage.fetches.append(Fetch(time.monotonic() - began, len(data)))
        return data


def has_link(job_input: object) -> bool:
    """Return whether a job's input, or the body in it, is behind a link."""
    return isinstance(job_input, dict) and (INPUT_URL in job_input or any(_linked_bodies(job_input)))


def _linked_bodies(job_input: Json) -> Iterable[str]:
    """Return the names of the fields whose value is behind a link."""
    return (name for name in BODIES if isinstance(body := job_input.get(name), dict) and INPUT_URL in body)


def _parsed(data: bytes) -> Json:
    """Return the JSON object that a link leads to."""
    try:
        check_shape(data)
        value = parse(data)
    except JobError as error:
        message = str(error).replace("The request body", "the link's content")
        raise InvalidRequestError(f"'input_url': {message}", param=INPUT_URL) from None
    except ValueError:
        raise InvalidRequestError("'input_url': the link's content is not valid JSON.", param=INPUT_URL) from None
    if not isinstance(value, dict):
        raise InvalidRequestError("'input_url': the link's content must be a JSON object.", param=INPUT_URL)
    if has_link(value):
        raise InvalidRequestError("'input_url': the link's content must not have an 'input_url' too.", param=INPUT_URL)
    return value
