"""Lines of a batch's input: what is accepted, and what is said about mistakes."""

import json
import re

import pytest

from tests.support.batches import LIMIT, item
from worker.batch import lines
from worker.batch.lines import Line, LineError
from worker.errors import Json
from worker.request.routes import ROUTES


def parse(value: object) -> Line | LineError:
    return lines.parse(7, json.dumps(value).encode(), LIMIT)


def test_a_line_becomes_a_call() -> None:
    value = item("a")
    assert parse(value) == Line(7, "a", "/v1/chat/completions", "", json.dumps(value["body"]).encode())


@pytest.mark.parametrize("route", [route for route, method in ROUTES.items() if method == "POST"])
def test_every_inference_route_with_a_body_is_accepted(route: str) -> None:
    path = route.replace("{id}", "resp_1")
    assert parse(item("a", url=f"{path}?x=1")) == Line(7, "a", path, "x=1", json.dumps(item("a")["body"]).encode())


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"url": "v1/chat/completions"}, id="a route without its slash"),
        pytest.param({"metadata": {"page": 3}}, id="a field that OpenAI does not have"),
        pytest.param({"body": {"stream": False, "background": None}}, id="fields that ask for no stream"),
        pytest.param({"body": {}}, id="an empty body, about which the engine says more"),
    ],
)
def test_harmless_lines_are_accepted(fields: Json) -> None:
    assert isinstance(parse(item("a", **fields)), Line)


def test_a_line_without_a_method_is_a_post() -> None:
    value = item("a")
    del value["method"]
    assert isinstance(parse(value), Line)


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        pytest.param(b"{", "invalid_json_line", "The line is not valid JSON: .* at column 2", id="no JSON"),
        pytest.param(b"<html>", "invalid_json_line", "not valid JSON: Expecting value at column 1", id="HTML"),
        pytest.param(b'{"a": 1} {"b": 2}', "invalid_json_line", "Extra data at column 10", id="two objects"),
        pytest.param(b"[1]", "invalid_json_line", "must be a JSON object, not a list", id="a list"),
        pytest.param(b"null", "invalid_json_line", "must be a JSON object, not null", id="null"),
        pytest.param(b"12", "invalid_json_line", "must be a JSON object, not a number", id="a number"),
        pytest.param(b"1" * 5000, "invalid_json_line", "The line is not valid JSON", id="a number that is too large"),
        pytest.param(
            b'{"a": "\xff"}', "invalid_json_line", "The line is not UTF-8.", id="bytes that are The line is not UTF-8."
        ),
        pytest.param(b"[" * 4000, "invalid_json_line", "nested 4000 levels deep", id="too deep"),
        pytest.param(b" " * (LIMIT + 1), "line_too_long", f"more than {LIMIT} bytes", id="too long"),
    ],
)
def test_a_line_that_is_no_object_has_no_id(text: bytes, code: str, message: str) -> None:
    error = lines.parse(7, text, LIMIT)
    assert isinstance(error, LineError)
    assert (error.number, error.custom_id, error.code) == (7, None, code)
    assert error.code in lines.NOT_OBJECTS
    assert re.search(message, error.message)


@pytest.mark.parametrize("custom_id", [None, "", 12, ["a"]])
def test_an_id_is_a_string(custom_id: object) -> None:
    message = "'custom_id' must be a string that is not empty."
    assert parse(item(custom_id)) == LineError(7, None, "missing_required_parameter", message)


def test_an_id_that_is_too_long_is_not_quoted() -> None:
    message = "'custom_id' has 513 characters. At most 512 are possible."
    assert parse(item("a" * 513)) == LineError(7, None, "invalid_custom_id", message)
    assert isinstance(parse(item("a" * 512)), Line)


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        pytest.param({"method": "GET"}, "invalid_method", "'method' must be 'POST'", id="GET"),
        pytest.param({"url": None}, "missing_required_parameter", "'url' must be a string", id="no route"),
        pytest.param({"url": "/v1/nothing"}, "invalid_url", "No route '/v1/nothing' for a batch", id="unknown route"),
        pytest.param({"url": "/v1/models"}, "invalid_url", "Available routes: /v1/chat", id="a GET route"),
        pytest.param({"url": "/sleep"}, "invalid_url", "No route '/sleep'", id="a control route"),
        pytest.param({"url": "/metrics"}, "invalid_url", "No route '/metrics'", id="a route of the worker"),
        pytest.param({"url": "/x" * 900}, "invalid_url", "x/…' for a batch", id="a long route"),
        pytest.param({"url": "/v1/responses/\ud800/cancel"}, "invalid_url", "ASCII characters only", id="a surrogate"),
        pytest.param({"url": "/v1/completions?\ud800"}, "invalid_url", "ASCII", id="a surrogate in the query"),
        pytest.param({"body": None}, "missing_required_parameter", "'body' must be an object", id="no body"),
        pytest.param({"body": "{}"}, "missing_required_parameter", "'body' must be an object", id="a body as text"),
        pytest.param({"body": {"stream": True}}, "invalid_request", "'body.stream' must be false", id="a stream"),
        pytest.param({"body": {"stream": "true"}}, "invalid_request", "'body.stream' must be", id="a stream as text"),
        pytest.param({"body": {"background": True}}, "invalid_request", "'body.background' must", id="background"),
    ],
)
def test_an_object_keeps_its_id_in_an_error(fields: Json, code: str, message: str) -> None:
    error = parse(item("a", **fields))
    assert isinstance(error, LineError)
    assert (error.number, error.custom_id, error.code) == (7, "a", code)
    assert message in error.message
    assert error.code not in lines.NOT_OBJECTS


def test_no_message_quotes_a_prompt() -> None:
    for text in (b'{"body": "secret', b'{"body": "secret\\x"}', b'{"secret"}', b'{"a": secret}'):
        error = lines.parse(1, text, LIMIT)
        assert isinstance(error, LineError)
        assert "secret" not in error.message


def test_a_duplicate_names_the_id_but_does_not_have_it() -> None:
    line = parse(item("a" * 200))
    error = lines.duplicate(line)
    assert (error.number, error.custom_id, error.code) == (7, None, "duplicate_custom_id")
    assert f"'{'a' * 99}…'" in error.message


@pytest.mark.parametrize("number", ["NaN", "1.0", '"\\u00e4"'])
def test_the_body_is_sent_as_it_stands_in_the_line(number: str) -> None:
    text = f'{{"custom_id": "a", "url": "/v1/completions", "body": {{ "x": {number} }}}}'
    line = lines.parse(1, text.encode(), LIMIT)
    assert isinstance(line, Line)
    assert json.dumps(json.loads(line.body)) == json.dumps({"x": json.loads(number)})
