"""Properties of addresses and of the removal of secrets. A target raises AssertionError if one does not hold."""

import ipaddress
import json
import shlex
from collections.abc import Callable, Mapping
from itertools import product
from urllib.parse import quote

from worker import redaction
from worker.media.addresses import is_public, may_be_public

CORE = "Zq7Xw4Kp9Rt2"
"""A part of each secret."""
SECRET_NAMES = ("HF_TOKEN", "WORKER_API_KEY", "AWS_SECRET_ACCESS_KEY", "OTEL_EXPORTER_OTLP_HEADERS")
SECRET_KEYS = ("token", "apiKey", "Authorization", "password", "hf_token")


def host(text: str) -> None:
    """Judge any host. Nothing is raised, and an address is never public as a text and not as a host."""
    if is_public(text) and not may_be_public(text):
        raise AssertionError(f"{text!r} is public as an address, but not as a host")


def address(number: int) -> None:
    """Judge an IPv4 address in every notation, and embedded in IPv6. All of them get one answer, or a stricter one."""
    ipv4 = ipaddress.IPv4Address(number)
    expected = is_public(str(ipv4))
    if expected and not ipv4.is_global:
        raise AssertionError(f"{ipv4} is not global")
    for spelling in spellings(number):
        if may_be_public(spelling) and not expected:
            raise AssertionError(f"{spelling} is public, but {ipv4} is not")
        if not may_be_public(spelling) and expected and ":" not in spelling:
            raise AssertionError(f"{spelling} is not public, but {ipv4} is")


def spellings(number: int) -> list[str]:
    """Return notations of an IPv4 address that C libraries and URLs accept."""
    octets = number.to_bytes(4, "big")
    low, word = number & 0xFFFF, number & 0xFFFFFF
    plain = [str(number), hex(number), f"0{number:o}", f"{octets[0]}.{word}", f"{octets[0]}.{octets[1]}.{low}"]
    plain += [".".join(map(form, octets)) for form in (str, hex, lambda octet: f"0{octet:o}", lambda o: f"0x{o:04X}")]
    high, dotted = f"{number >> 16:x}:{low:x}", ".".join(map(str, octets))
    embedded = [f"{prefix}{tail}" for prefix, tail in product(("::ffff:", "64:ff9b::", "::"), (high, dotted))]
    embedded += [f"2002:{high}::1", f"2001:470::5efe:{high}", f"2001:0:{high}::", f"64:ff9b:1::{high}"]
    inverted = number ^ 0xFFFFFFFF
    embedded.append(f"2001::{inverted >> 16:x}:{inverted & 0xFFFF:x}")
    return [*plain, *(f"{text}." for text in plain), *embedded, *(f"[{text.upper()}]" for text in embedded)]


def secret(text: str) -> None:
    """Plant a secret wherever a setting may hold one. It contains `CORE`, which must not be printed anywhere."""
    for name, value in plantings(text):
        printed = json.dumps(redaction.public(value, name), ensure_ascii=False)
        if CORE in printed:
            raise AssertionError(f"{name}={value!r} is printed as {printed}")
        remove = redaction.remover(redaction.secrets_in({name: value}))
        for message in messages(text, value):
            if CORE in (cleaned := remove(message)):
                raise AssertionError(f"with {name}={value!r}, {message!r} is printed as {cleaned!r}")


def plantings(text: str) -> list[tuple[str, str]]:
    """Return names and values of settings that hold a secret."""
    nested = [json.dumps({"a": [{key: text, "b": 1}]}) for key in SECRET_KEYS]
    url = f"https://user:{quote(text)}@host.example/path"
    return [
        *((name, text) for name in SECRET_NAMES),
        *(("MODEL_LOADER_EXTRA_CONFIG", value) for value in nested),
        ("MODEL_LOADER_EXTRA_CONFIG", json.dumps({"headers": {"x": [text]}})),
        ("S3_ENDPOINT", url),
        ("HTTP_PROXY", json.dumps({"proxy": url})),
    ]


def messages(text: str, value: str) -> list[str]:
    """Return messages of libraries that quote a value of a setting, or the secret in it."""
    quoted: list[Callable[[str], str]] = [str, repr, json.dumps, quote]
    return [f"cannot use {value}: refused", *(f"cannot use {form(text)}: refused" for form in quoted)]


def command_line(text: str) -> None:
    """Plant a secret in VLLM_EXTRA_ARGS, which is secret as a whole."""
    variables: Mapping[str, str] = {redaction.EXTRA_ARGS: shlex.join(["--api-key", text, f"--hf-token={text}"])}
    if CORE in str(redaction.public(variables[redaction.EXTRA_ARGS], redaction.EXTRA_ARGS)):
        raise AssertionError("VLLM_EXTRA_ARGS is printed")
    remove = redaction.remover(redaction.secrets_in(variables))
    for message in messages(text, text):
        if CORE in remove(message):
            raise AssertionError(f"{message!r} is printed as {remove(message)!r}")
