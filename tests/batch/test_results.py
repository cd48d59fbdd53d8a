"""Result lines: exactly OpenAI's, and a summary of each without parsing it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.batches import KEY, answer, line, result
from worker.batch import results
from worker.batch.lines import LineError
from worker.batch.results import Summary


def test_an_answer_has_openais_fields() -> None:
    text = results.answered(KEY, line(3, "a"), 200, {"id": "x"})
    assert text == (
        b'{"id":"batch_req_job-1_3","custom_id":"a","response":{"status_code":200,'
        b'"request_id":"batch_req_job-1_3","body":{"id":"x"}},"error":null}\n'
    )


def test_an_error_of_the_engine_is_a_response() -> None:
    value = json.loads(results.answered(KEY, line(3), 400, {"error": {"message": "wrong"}}))
    assert value["response"]["status_code"] == 400
    assert value["response"]["body"] == {"error": {"message": "wrong"}}
    assert value["error"] is None


def test_a_line_that_was_not_asked_has_no_response() -> None:
    value = json.loads(results.refused(KEY, LineError(4, None, "invalid_json_line", "The line is wrong.")))
    assert value == {
        "id": "batch_req_job-1_4",
        "custom_id": None,
        "response": None,
        "error": {"code": "invalid_json_line", "message": "The line is wrong."},
    }


@pytest.mark.parametrize("breaks", ["\n\r\x0b\x0c", "\x1c\x1d\x1e\x85", "\u2028\u2029", "\ud800"])
def test_a_result_is_one_line_for_every_program(breaks: str) -> None:
    text = results.answered(KEY, line(3, f"a{breaks}"), 200, {"content": breaks})
    assert len(text.decode().splitlines()) == 1
    assert json.loads(text)["custom_id"] == f"a{breaks}"
    assert json.loads(text)["response"]["body"] == {"content": breaks}


def test_text_is_not_escaped_without_need() -> None:
    assert "こんにちは".encode() in results.answered(KEY, line(3), 200, {"content": "こんにちは"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(result(3), Summary(3, "id-3", True, 7, 5), id="an answer, with a text that looks like usage"),
        pytest.param(result(3, status=400), Summary(3, "id-3", False, 0, 0), id="an error of the engine"),
        pytest.param(
            results.refused(KEY, LineError(9, None, "invalid_url", '"response":{"status_code":200,')),
            Summary(9, None, False, 0, 0),
            id="a line that was not asked",
        ),
        pytest.param(
            results.answered(KEY, line(5), 200, {"usage": {"input_tokens": 3, "output_tokens": 4}}),
            Summary(5, "id-5", True, 3, 4),
            id="usage of /v1/responses and /v1/messages",
        ),
        pytest.param(
            results.answered(KEY, line(5), 200, {"usage": {"prompt_tokens": 3, "total_tokens": 3}}),
            Summary(5, "id-5", True, 3, 0),
            id="usage of embeddings",
        ),
        pytest.param(results.answered(KEY, line(5), 200, None), Summary(5, "id-5", True, 0, 0), id="no body"),
    ],
)
def test_a_summary(text: bytes, expected: Summary) -> None:
    assert results.summary(KEY, text) == expected


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(result(3, key="job-2"), id="another batch"),
        pytest.param(result(3, key="job-1_3"), id="a batch whose key begins like this one"),
        pytest.param(b'{"id":"batch_req_job-1_3","custom_id":"a', id="an incomplete line"),
        pytest.param(b"\n", id="an empty line"),
        pytest.param(b"\0" * 100 + result(3), id="a damaged line"),
    ],
)
def test_other_lines_have_no_summary(text: bytes) -> None:
    assert results.summary(KEY, text) is None


@given(st.text(min_size=1), st.integers(1, 1_000_000), st.sampled_from(["a", "a_1", "-", "a-_2"]))
def test_every_id_and_key_comes_back(custom_id: str, number: int, key: str) -> None:
    text = results.answered(key, line(number, custom_id), 200, answer(number))
    assert text.startswith(results.prefix(key))
    assert results.summary(key, text) == Summary(number, custom_id, True, 7, 5)
