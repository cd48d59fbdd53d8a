"""The rule for secrets: names, values, and their removal from texts."""

import json

import pytest

from worker import redaction


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN", "WORKER_API_KEY", "VLLM_API_KEY", "API_KEY_2", "RUNPOD_WEBHOOK_GET_JOB", "VLLM_EXTRA_ARGS",
        "OTEL_EXPORTER_OTLP_HEADERS", "AWS_SECRET_ACCESS_KEY", "X-Amz-Security-Token", "Authorization", "cookie", "key",
        "--api-key", "--model-loader-extra-config.token", "apiKey", "accessToken", "password", "db_pass", "DB_PWD",
    ],
)  # fmt: skip
def test_secret_names(name: str) -> None:
    assert redaction.is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "TOKENIZER", "TOKENIZER_MODE", "MAX_NUM_BATCHED_TOKENS", "max_tokens", "num_speculative_tokens", "eos_token_id",
        "PWD", "OLDPWD", "SSL_KEYFILE", "num_key_value_heads", "pass_config", "inductor_passes", "SEED", "MODEL_NAME",
    ],
)  # fmt: skip
def test_names_that_are_not_secret(name: str) -> None:
    assert not redaction.is_secret(name)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param("https://user:pass@host/path", "https://***@host/path", id="URL"),
        pytest.param("http://u:a/b@c#d?e@host/x", "http://***@host/x", id="URL with separators in the password"),
        pytest.param("https://host/x?api_key=abc&y=1", "https://host/x?api_key=***", id="query"),
        pytest.param('{"token": "abc", "a": 1}', '{"token": "***", "a": 1}', id="JSON text"),
        pytest.param({"a": [{"headers": {"x": "abc"}}]}, {"a": [{"headers": "***"}]}, id="nested keys"),
        pytest.param({"token": None, "headers": True}, {"token": None, "headers": True}, id="nothing secret"),
        pytest.param({"key": 123456}, {"key": "***"}, id="secret number"),
        pytest.param('{"token": "abc"', '{"token": ***', id="JSON that is cut off"),
        pytest.param("authorization=Bearer abc,x=y", "authorization=***", id="header"),
        pytest.param('{"image":  2}', '{"image":  2}', id="JSON without secrets stays as it is"),
        pytest.param("name=path,b=c", "name=path,b=c", id="list without secrets"),
        pytest.param("{{ bos_token }} https://host/x", "{{ bos_token }} https://host/x", id="template"),
        pytest.param(0.5, 0.5, id="number"),
    ],
)  # fmt: skip
def test_values_without_their_secrets(value: object, expected: object) -> None:
    assert redaction.public(value) == expected


def test_the_values_of_secret_names_are_replaced_as_a_whole() -> None:
    assert redaction.public(("a", "b"), "WORKER_API_KEY") == "***"
    assert (redaction.public(None, "HF_TOKEN"), redaction.public((), "WORKER_API_KEY")) == (None, ())


@pytest.mark.parametrize(
    ("variables", "secret"),
    [
        pytest.param({"WORKER_API_KEY": "first-key, second-key"}, "second-key", id="one of several keys"),
        pytest.param({"WORKER_API_KEY": "[first-key"}, "first-key", id="list that is cut off"),
        pytest.param({"OTEL_EXPORTER_OTLP_HEADERS": "x=y,authorization=Bearer%20abcdef"}, "abcdef", id="header"),
        pytest.param({"VLLM_EXTRA_ARGS": "--api-key abcdef ghijkl --seed 3"}, "ghijkl", id="second value of a flag"),
        pytest.param({"VLLM_EXTRA_ARGS": "--x.token=abcdef 'open"}, "abcdef", id="open quotation"),
        pytest.param({"VLLM_EXTRA_ARGS": """--x '{"token": "abcdef"}'"""}, "abcdef", id="JSON on a command line"),
        pytest.param({"X": '{"a": {"token": "abcdef"}}'}, "abcdef", id="JSON"),
        pytest.param({"X": '{"password": 123456}'}, "123456", id="number"),
        pytest.param({"X": "http://user:abcdef/x@host/"}, "abcdef", id="part of a password that a URL parser quotes"),
    ],
)
def test_secrets_are_found_in_variables(variables: dict[str, str], secret: str) -> None:
    assert secret in redaction.secrets_in(variables)


def test_ordinary_values_are_no_secrets() -> None:
    variables = {"VLLM_EXTRA_ARGS": "--dtype bfloat16 --api-key abcdef", "MODEL_NAME": "org/model", "PWD": "/worker"}
    assert redaction.secrets_in(variables) == ("abcdef",)


@pytest.mark.parametrize("secret", ["sé\ncret", "a\"b'c\\d", "a b/c@d", "secret+more"])
def test_secrets_are_removed_in_every_spelling(secret: str) -> None:
    remove = redaction.remover([secret, secret[:6]])
    for text in (secret, json.dumps(secret), json.dumps(secret, ensure_ascii=False), repr(secret)):
        assert remove(f"before {text} after").strip("\"'").replace('"', "").replace("'", "") == "before *** after"


def test_short_secrets_do_not_garble_texts() -> None:
    assert redaction.remover(["a", "key"])("a key") == "a key"


def test_the_inputs_that_pydantic_quotes_are_removed() -> None:
    text = "1 error\nx\n  Not a number [type=int_parsing, input_value='S3C...R3T', input_type=str]\n  More"
    assert redaction.remover([])(text) == "1 error\nx\n  Not a number\n  More"
