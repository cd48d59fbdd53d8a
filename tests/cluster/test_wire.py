"""Messages are checked when they are read, whatever a stranger sends."""

import asyncio
import json
import random
from typing import Any

import pytest

from worker.cluster import terms, wire
from worker.cluster.wire import Join, WireError

JOIN = Join(1, 2, "10.0.0.2", 40000, "8 x H100", terms.of({"vllm": "0.32.0"}))


def received(data: bytes) -> Any:
    """Return the first message of a connection that receives these bytes and ends."""

    async def run() -> Any:
        reader = asyncio.StreamReader(limit=wire.LINE_BYTES)
        reader.feed_data(data)
        reader.feed_eof()
        return await wire.receive(reader)

    return asyncio.run(run())


def test_a_message_survives_the_wire() -> None:
    message = received(wire.encode(JOIN.message("a nonce", "a proof")))
    assert Join.of(message) == JOIN
    assert (wire.text(message, "nonce"), wire.text(message, "proof")) == ("a nonce", "a proof")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        pytest.param(b"", "closed the connection", id="nothing"),
        pytest.param(b'{"beat":1}', "closed the connection", id="half a line"),
        pytest.param(b"GET / HTTP/1.1\r\n", "not JSON", id="an HTTP request"),
        pytest.param(b"\xff\xfe\n", "not JSON", id="bytes that are no text"),
        pytest.param(b"[" * 200_000 + b"\n", "not JSON", id="deep lists"),
        pytest.param(b"1" * 10_000 + b"\n", "not JSON", id="a long number"),
        pytest.param(b"[]\n", "not a JSON object", id="a list"),
        pytest.param(b"x" * (wire.LINE_BYTES + 1) + b"\n", "more than 262144 bytes", id="a long line"),
        pytest.param(b"x" * 3 * wire.LINE_BYTES, "more than 262144 bytes", id="a line without an end"),
    ],
)
def test_junk_is_no_message(data: bytes, why: str) -> None:
    with pytest.raises(WireError, match=why):
        received(data)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        pytest.param({"rank": "1"}, "'rank' is no integer", id="a rank that is a text"),
        pytest.param({"rank": True}, "'rank' is no integer", id="a rank that is a Boolean"),
        pytest.param({"nodes": 2.0}, "'nodes' is no integer", id="a number with a point"),
        pytest.param({"address": None}, "'address' is no text", id="no address"),
        pytest.param({"terms": []}, "'terms' are no pairs of texts", id="terms that are a list"),
        pytest.param({"terms": {"vllm": ["digest"]}}, "'terms' are no pairs of texts", id="a term without its value"),
        pytest.param(
            {"terms": {"vllm": ["digest", 1]}}, "'terms' are no pairs of texts", id="a value that is a number"
        ),
    ],
)
def test_a_join_with_a_wrong_field_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(WireError, match=why):
        Join.of({**json.loads(wire.encode(JOIN.message("", ""))), **changes})


def test_texts_of_strangers_are_short_and_on_one_line() -> None:
    assert wire.text({"what": "first\nsecond\x1b[31m\ud800"}, "what") == "first second [31m "
    assert len(wire.text({"what": "x" * 10_000}, "what")) == wire.TEXT_CHARACTERS
    assert wire.texts({"refuse": ["a\nb"]}, "refuse") == ["a b"]
    with pytest.raises(WireError, match="'refuse' is no list of texts"):
        wire.texts({"refuse": ["a", 1]}, "refuse")


def test_a_proof_holds_for_its_key_and_parts_only() -> None:
    proof = wire.proof(b"key", "node", "1", "nonce")
    assert wire.is_proof(proof, b"key", "node", "1", "nonce")
    assert not wire.is_proof(proof, b"other", "node", "1", "nonce")
    assert not wire.is_proof(proof, b"key", "node", "2", "nonce")
    assert not wire.is_proof(proof, b"key", "head", "1", "nonce")
    assert not wire.is_proof("", b"key", "node", "1", "nonce")


def test_random_bytes_are_messages_or_errors() -> None:
    chance = random.Random(21)
    line = wire.encode(JOIN.message("nonce", "proof"))
    for _ in range(2000):
        data = bytearray(line)
        for _ in range(chance.randint(1, 5)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            message = wire.decode(bytes(data))
            Join.of(message)
            wire.text(message, "proof")
        except WireError:
            pass
