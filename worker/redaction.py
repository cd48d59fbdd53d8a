"""Decides what is secret, and removes secrets from everything that the worker prints: settings, errors and log lines.

Three things are secret: the value of a setting, flag or JSON key with a secret name; the user and password of a URL;
and whatever follows a secret name with `=` or `:` in any other text. `is_secret` judges every name.
"""

import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote

HIDDEN = "***"
SHORTEST = 6
"""Shorter secrets are not searched for in texts, because they would match parts of ordinary words."""
EXTRA_ARGS = "VLLM_EXTRA_ARGS"
"""The setting that holds a command line."""
SECRET_NAME = re.compile(
    "secret|passw|passphrase|credential|authorization|cookie|bearer|signature|webhook|vllm_extra_args"
    "|(api|access|private)_?key|(api|auth|access|refresh)_?token"
    r"|(^|_)(token|keys?|headers?|o?auth|pass|jwt|sig|dsn)_?\d*$|_pwd$"
)
"""Matches secret names in lower case with underscores. `max_tokens` and `tokenizer` are no secrets, nor is `PWD`."""
_CAPITAL = re.compile("(?<=[a-z0-9])(?=[A-Z])")
_URL_USER = re.compile(r"(?<=://)\S*(?=@)")
"""The user and password of a URL: up to its last `@`, because a password may contain `/`, `@`, `#` and `?`."""
_URL_SEPARATORS = re.compile("[:/@#?]")
_ASSIGNED = re.compile(r"""([\w.-]+)["']?\s*[=:]\s*""")
_SEPARATORS = re.compile(r"""[\s,;&"'\[\]{}]+""")
_PYDANTIC_INPUT = re.compile(r" ?\[type=\w+, input_value=.*?, input_type=\w+\]")
"""pydantic's errors quote the input, and shorten it, so that a secret in it cannot be recognized."""
_SCHEMES = ("bearer", "digest")


def is_secret(name: str) -> bool:
    """Return whether the values of a setting, flag, JSON key or header with this name are secret."""
    words = _CAPITAL.sub("_", name)
    return bool(SECRET_NAME.search(re.sub(r"\W+", "_", words).lower()))


def public(value: Any, name: str = "") -> Any:
    """Return a copy of a JSON value without secrets. `name` is the setting, flag or key that it belongs to."""
    return _public(value, name, [])


def secrets_in(variables: Mapping[str, str]) -> tuple[str, ...]:
    """Return the secrets in the values of variables, for `remover`."""
    found: list[str] = []
    for name, value in variables.items():
        for flag, word in flag_values(value) if name == EXTRA_ARGS else [(name, value)]:
            _public(word, flag, found)
    return tuple(sorted({piece for secret in found for piece in _pieces(secret) if len(piece) >= SHORTEST}))


def flag_values(command_line: str) -> Iterator[tuple[str, str]]:
    """Yield each value on a command line, with the flag before it."""
    try:
        words = shlex.split(command_line)
    except ValueError:
        words = command_line.split()
    flag = ""
    for word in words:
        if word.startswith("-"):
            flag, _, word = word.partition("=")
        if word:
            yield flag, word


def remover(secrets: Iterable[str]) -> Callable[[str], str]:
    """Return a function that removes the secrets from a text, also where they are escaped, and pydantic's inputs."""
    spellings = {spelling for secret in secrets for spelling in _spellings(secret) if len(spelling) >= SHORTEST}
    # The longest first: one secret may be a part of another.
    words = "|".join(map(re.escape, sorted(spellings, key=len, reverse=True)))
    pattern = re.compile(words) if words else None

    def remove(text: str) -> str:
        text = _PYDANTIC_INPUT.sub("", text)
        return pattern.sub(HIDDEN, text) if pattern else text

    return remove


def _public(value: Any, name: str, found: list[str]) -> Any:
    """Return a copy of `value` without secrets, and add each secret to `found`."""
    if value is None or isinstance(value, bool):
        return value
    if is_secret(name):
        found += _leaves(value)
        return HIDDEN if value or value == 0 else value
    if isinstance(value, Mapping):
        return {_public_text(str(key), found): _public(item, str(key), found) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_public(item, "", found) for item in value]
    return _public_text(value, found) if isinstance(value, str) else value


def _public_text(text: str, found: list[str]) -> str:
    if text.lstrip().startswith(("{", "[")):
        try:
            value = json.loads(text)
        except ValueError:
            pass
        else:
            copy = _public(value, "", found)
            return text if copy == value else json.dumps(copy, ensure_ascii=False)
    for user in _URL_USER.findall(text):
        # Errors of URL parsers quote parts of it.
        found += [user, *_URL_SEPARATORS.split(user)]
    text = _URL_USER.sub(HIDDEN, text)
    for assigned in _ASSIGNED.finditer(text):
        if is_secret(assigned[1]):
            found.append(text[assigned.end() :])
            return text[: assigned.end()] + HIDDEN
    return text


def _leaves(value: Any) -> Iterator[str]:
    """Yield the texts and numbers in a JSON value."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield str(value)


def _pieces(secret: str) -> Iterator[str]:
    """Yield a secret, and the parts that may be printed without the rest: list items, a header's value, a password."""
    yield secret
    for item in _SEPARATORS.split(f"{secret} {unquote(secret)}"):
        if item.lower() not in _SCHEMES:
            yield item.strip(":=")
            yield item.partition("=")[2]
            yield item.partition(":")[2]


def _spellings(secret: str) -> Iterator[str]:
    """Yield a secret as it is, and as JSON, Python and URLs write it."""
    yield secret
    yield json.dumps(secret)[1:-1]
    yield json.dumps(secret, ensure_ascii=False)[1:-1]
    yield repr(secret)[1:-1]
    yield quote(secret, safe="")
    yield quote(secret)
    yield unquote(secret)
    # As Python shows a JSON text that holds the secret.
    yield repr(json.dumps(secret)[1:-1])[1:-1]
