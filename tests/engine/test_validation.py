"""Validation of request bodies by vLLM's own routes. No engine runs."""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.dependencies.utils import request_body_to_args
from fastapi.routing import APIRoute
from pydantic import TypeAdapter
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.pooling.embed import api_router as embed
from vllm.entrypoints.serve.exception_handling import utils as messages

from tests.support import tiny
from worker import engine, settings
from worker.engine.media_errors import keep_bodies
from worker.engine.validation import MAX_MESSAGE_CHARACTERS, bounded, fail_fast, in_threads
from worker.request.asgi import Message, Receive, Request, Send, exchange

CHAT, RESPONSES, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/completions", "/v1/messages"
TASKS: Any = ("generate", "render", "transcription")
SECRET = "text that no error may repeat"
BIAS = {str(token): "a" for token in range(100_000)}
CLAUDE = {"model": "m", "max_tokens": 1}
USER = {"role": "user", "content": "hi"}


def vllm_app() -> FastAPI:
    args = engine.parse_arguments(settings.read({"MODEL_NAME": str(tiny.MODEL)}))
    app = build_app(args, TASKS)
    app.include_router(embed.router)
    return app


@pytest.fixture(scope="module")
def original() -> FastAPI:
    """vLLM's app as it is."""
    return vllm_app()


@pytest.fixture(scope="module")
def app() -> FastAPI:
    """vLLM's app whose validation fails fast."""
    app = vllm_app()
    fail_fast(app)
    return app


def answer(app: FastAPI, path: str, body: Any) -> tuple[int, Any]:
    """Return the status and the error of the response to a request."""

    async def run() -> tuple[int, Any]:
        data = json.dumps(body).encode()
        request = Request("POST", path, headers={"content-type": "application/json"}, body=data)
        async with exchange(app, request) as response:
            return response.status, json.loads(await response.read_all())["error"]

    return asyncio.run(run())


def body_routes(app: FastAPI) -> Iterator[APIRoute]:
    """Yield the routes that have a body."""
    return (route for route in app.routes if isinstance(route, APIRoute) and route.body_field)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        pytest.param(CHAT, {"messages": [{"a": SECRET}] * 120_000}, "body.messages.0", id="messages"),
        pytest.param(CHAT, {"messages": [{"role": "user", "content": 1}] * 50_000}, "body.messages.0", id="contents"),
        pytest.param(CHAT, {"messages": [], "tools": [{}] * 50_000}, "body.tools.0", id="tools"),
        pytest.param(CHAT, {"messages": [], "logit_bias": BIAS}, "body.logit_bias.0", id="a bias"),
        pytest.param(f"{CHAT}/batch", {"messages": [[{}] * 50_000]}, "body.messages.0.0", id="a batch"),
        pytest.param(RESPONSES, {"input": [1] * 120_000}, "body.input", id="numbers as input"),
        pytest.param(RESPONSES, {"input": [{"role": "user", "content": [{}] * 50_000}]}, "body.input", id="parts"),
        pytest.param(MESSAGES, CLAUDE | {"messages": [{}] * 50_000}, "body.messages.0", id="anthropic"),
        pytest.param(COMPLETIONS, {"prompt": [*[1] * 999_999, "a"]}, "body.prompt.999999", id="tokens"),
        pytest.param("/tokenize", {"messages": [{}] * 50_000}, "body.", id="tokenize"),
        pytest.param("/v1/embeddings", {"input": [[1], *[{}] * 50_000]}, "body.", id="embeddings"),
    ],
)
def test_a_body_with_many_mistakes_costs_little(app: FastAPI, path: str, body: Any, param: str) -> None:
    began = time.process_time()
    status, error = answer(app, path, body)
    # Measured: 0.02 to 0.2 s, and before 1 to 90 s.
    assert time.process_time() - began < 2
    assert (status, error["type"], error["code"]) == (400, "Bad Request", 400)
    assert error["param"].startswith(param)
    assert len(error["message"]) < 6_000
    assert SECRET not in error["message"]


MISTAKES = [
    pytest.param(CHAT, {}, id="no messages"),
    pytest.param(CHAT, [], id="a list"),
    pytest.param(CHAT, {"messages": "hi"}, id="text for a list"),
    pytest.param(CHAT, {"messages": [{"role": "user", "content": "hi"}, {"role": 1}]}, id="the second message"),
    pytest.param(CHAT, {"messages": [{"role": "user", "content": 1}]}, id="content"),
    pytest.param(CHAT, {"messages": [], "temperature": "hot", "top_p": "high"}, id="two fields"),
    pytest.param(CHAT, {"messages": [], "tools": [{"type": "function"}]}, id="a tool without function"),
    pytest.param(CHAT, {"messages": [], "stop": ["a", 1]}, id="a stop that is a number"),
    pytest.param(CHAT, {"messages": [], "logit_bias": {"1": "a"}}, id="a bias that is text"),
    pytest.param(CHAT, {"messages": [], "response_format": {"type": "json_schema"}}, id="no schema"),
    pytest.param(
        CHAT, {"messages": [], "stream_options": {"include_usage": True}}, id="options of a stream without stream"
    ),
    pytest.param(CHAT, {"messages": [], "structured_outputs": {"choice": [1]}}, id="a choice that is a number"),
    pytest.param(RESPONSES, {"input": [{"role": "user", "content": "hi"}, {"type": "none"}]}, id="an unknown item"),
    pytest.param(RESPONSES, {"input": "hi", "tools": [{"type": "none"}]}, id="an unknown tool"),
    pytest.param(RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, id="no text"),
    pytest.param(COMPLETIONS, {"prompt": {}}, id="an object as a prompt"),
    pytest.param(COMPLETIONS, {"prompt": [[1, "a"]]}, id="text among tokens"),
    pytest.param(COMPLETIONS, {"prompt": "hi", "stop": 1}, id="a number as stop"),
    pytest.param(MESSAGES, CLAUDE | {"messages": [{"role": "user"}]}, id="no content"),
    pytest.param("/v1/embeddings", {"input": [{}]}, id="an object to embed"),
    pytest.param("/detokenize", {"tokens": [1, "a"]}, id="text for a token"),
]


@pytest.mark.parametrize(("path", "body"), MISTAKES)
def test_an_ordinary_mistake_has_the_error_of_vllm(original: FastAPI, app: FastAPI, path: str, body: Any) -> None:
    status, error = answer(app, path, body)
    assert (status, error) == answer(original, path, body)
    assert status == 400


def test_an_error_repeats_little_of_a_key_or_a_value(app: FastAPI) -> None:
    _, error = answer(app, CHAT, {"messages": [], "logit_bias": {"k" * 1_000_000: "v" * 1_000_000}})
    assert len(error["message"]) < 1_000
    assert error["param"] == "body.logit_bias." + "k" * 100


IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png", "detail": "low"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"enum": [1, None]}}}}}
ITEMS = [
    {"role": "user", "content": "hi"},
    {"role": "user", "content": [{"type": "input_text", "text": "hi"}, {"type": "input_image", "image_url": "x"}]},
    {
        "type": "message",
        "role": "assistant",
        "id": "1",
        "status": "completed",
        "content": [{"type": "output_text", "text": "x", "annotations": []}],
    },
    {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "x"}]},
    {"type": "reasoning", "id": "1", "summary": [{"type": "summary_text", "text": "x"}]},
    {"type": "item_reference", "id": "1"},
]
BODIES = [
    pytest.param(
        CHAT,
        {
            "messages": [
                {"role": "system", "content": "hi"},
                {"role": "user", "content": [{"type": "text", "text": "?"}, IMAGE]},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "x"}]},
                {"role": "other", "content": "x", "more": {"a": [1, {"type": "list"}]}},
            ],
            "tools": [TOOL],
            "stop": ["a"],
            "logit_bias": {"1": 2},
            "metadata": {"type": "list"},
        },
        id="chat",
    ),
    pytest.param(RESPONSES, {"input": ITEMS, "tools": [{"type": "mcp", "server_label": "x"}]}, id="items"),
    pytest.param(COMPLETIONS, {"prompt": [[1, 2], [3]], "stop": "a"}, id="tokens"),
    pytest.param(COMPLETIONS, {"prompt": ["a", "b"]}, id="texts"),
    pytest.param(MESSAGES, CLAUDE | {"messages": [USER]}, id="anthropic"),
    pytest.param("/tokenize", {"messages": [USER | {"content": [{"type": "text", "text": "?"}]}]}, id="tokenize"),
    pytest.param("/v1/embeddings", {"input": ["a", "b"]}, id="embeddings"),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_a_valid_body_becomes_the_same_request(app: FastAPI, path: str, body: Any) -> None:
    (route,) = (route for route in body_routes(app) if route.path == path)
    (field,) = route.dependant.body_params
    value, errors = field.validate(body)
    assert not errors
    annotation: Any = field.field_info.annotation
    assert shown(value) == shown(TypeAdapter(annotation).validate_python(body))


def shown(value: Any) -> str:
    """Return a request as text, with the items of one-shot iterators, without what is drawn at random."""
    iterators = re.sub(r"SerializationIterator\(.*?\)", "", repr(value))
    return re.sub(r"[0-9a-f-]{16,}|0x[0-9a-f]+", "", f"{iterators} {value.model_dump_json()}")


def test_all_lists_of_all_routes_fail_fast(original: FastAPI, app: FastAPI) -> None:
    routes = list(body_routes(app))
    assert len(routes) > 15
    for route in routes:
        assert route.dependant.body_params
        for field in route.dependant.body_params:
            assert "fail_fast: false" not in repr(field._type_adapter.validator)
    (field,) = next(body_routes(original)).dependant.body_params
    assert "fail_fast: false" in repr(field._type_adapter.validator)


def test_the_start_is_not_delayed(original: FastAPI) -> None:
    began = time.process_time()
    fail_fast(original)
    # Measured: 0.06 s.
    assert time.process_time() - began < 1


def test_large_bodies_are_validated_while_other_requests_go_on(app: FastAPI) -> None:
    (route,) = (route for route in body_routes(app) if route.path == RESPONSES)
    body = {"input": "hi", "tools": [{"type": "mcp", "server_label": "x", "server_url": "x"}] * 20_000}
    gaps: list[float] = []
    validated: list[Any] = []

    async def watch() -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.01)
            gaps.append(time.monotonic() - began)

    async def validating(_scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        watching = asyncio.create_task(watch())
        await asyncio.sleep(0)
        fields = route.dependant.body_params
        validated.append(
            await in_threads(request_body_to_args)(
                body_fields=fields, received_body=body, embed_body_fields=route._embed_body_fields
            )
        )
        watching.cancel()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    async def run() -> None:
        request = Request("POST", RESPONSES, body=json.dumps(body).encode())
        async with exchange(keep_bodies(validating), request) as response:
            await response.read_all()

    asyncio.run(run())
    ((values, errors),) = validated
    assert not errors
    assert len(values["request"].tools) == 20_000
    # Measured: 40 gaps. On the event loop it would be none.
    assert len(gaps) > 5


def cleaned(message: str) -> str:
    """Return what vLLM makes of an error's message, with the bounded patterns."""
    patterns = SimpleNamespace(sub=bounded(vars(messages)["re"].sub))
    code = messages.sanitize_message.__code__
    result: str = FunctionType(code, {"re": patterns})(message)
    return result


@pytest.mark.parametrize("text", ["/a", "/home/a", "/aaaaaaaaaaaaaaa", "/a.b", "\n", 'File "', "a"])
def test_a_long_message_is_cleaned_at_little_cost(text: str) -> None:
    began = time.process_time()
    assert len(cleaned(f"The model `{text * 500_000}` does not exist.")) <= MAX_MESSAGE_CHARACTERS
    # Measured: 0.02 s, and before 12 s for 10 kB.
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "message",
    [
        "The model `org/name` does not exist.",
        "The model `/models/org/name-7B.gguf` and /usr/lib/python3/x.py, a/b/c/d.e, /v1/chat/completions",
        'Traceback\n  File "/usr/lib/x.py", line 3, in f\n    x()\nValueError: <object at 0x7f00>',
        "Line one\nLine two " * 150,
    ],
)
def test_an_ordinary_message_is_cleaned_as_by_vllm(message: str) -> None:
    assert cleaned(message) == messages.sanitize_message(message)
