"""Request bodies that are wrong, or small but costly: for a chat, unless they name another route."""

import gzip
import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from tests.support import media

CHAT = "/v1/chat/completions"
JSON = MappingProxyType({"content-type": "application/json"})


class Body(NamedTuple):
    """A hostile body. It must be refused, or, if it `may_pass`, may be answered at little cost."""

    name: str
    content: bytes
    may_pass: bool = False
    route: str = CHAT
    headers: Mapping[str, str] = JSON


def chat(**fields: Any) -> bytes:
    """Return the body of a short chat with more fields, or other ones."""
    base = {"model": "tiny", "messages": [{"role": "user", "content": "What is this?"}], "max_tokens": 4}
    return json.dumps(base | fields).encode()


def chat_with(text: str) -> bytes:
    """Return the body of a short chat with one more field, written as JSON text."""
    return chat()[:-1] + f", {text}}}".encode()


def chat_about(kind: str, *urls: str, **fields: Any) -> bytes:
    """Return the body of a chat about images or videos."""
    parts: list[Any] = [{"type": f"{kind}_url", f"{kind}_url": {"url": url}} for url in urls]
    return chat(messages=[{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}], **fields)


def wrong_messages(count: int = 120_000) -> bytes:
    """Return a body of 1.4 MB with messages that lack everything."""
    return chat()[:-1] + b', "messages": [' + b",".join([b'{"role": 1}'] * count) + b"]}"


def bad_images(count: int = 100, size: int = 150_000) -> bytes:
    """Return a body of 20 MB with images that cannot be decoded. Each is different."""
    urls = [media.data_url(f"no image {number}".encode() + bytes(size), "image/png") for number in range(count)]
    return chat_about("image", *urls)


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


def shapes() -> Iterator[Body]:
    """Yield bodies with many, deep or unusual values."""
    yield Body("an empty body", b"")
    yield Body("null", b"null")
    yield Body("a list", b"[]")
    yield Body("a number", b"1")
    yield Body("no message", chat(messages=[]), may_pass=True)
    yield Body("half a body", chat()[:-20])
    yield Body("invalid UTF-8", chat(messages=[{"role": "user", "content": "@"}]).replace(b"@", b"\xff\xfe\xc0\x80"))
    yield Body("UTF-16", chat().decode().encode("utf-16"), may_pass=True)
    yield Body("a byte order mark", b"\xef\xbb\xbf" + chat(), may_pass=True)
    yield Body("a half surrogate", chat_with('"user": "\\ud800"'), may_pass=True)
    yield Body("a message with a half surrogate", chat().replace(b"What", b"\\udfff"), may_pass=True)
    yield Body("zeros", bytes(20_000_000))
    yield Body("spaces", b" " * 29_000_000)
    yield Body("100,000 nested lists", chat_with(f'"x": {nested(100_000)}'))
    opening = '{"a":'
    yield Body("100,000 nested objects", chat_with(f'"x": {opening * 100_000}1{"}" * 100_000}'))
    yield Body("900 nested lists", chat_with(f'"x": {nested(900)}'), may_pass=True)
    deep_parts = nested(900, '[{"type": "text", "text": ', "}]")
    yield Body("deep content", chat_with(f'"messages": [{{"role": "user", "content": {deep_parts}}}]'))
    yield Body("9.9 million empty lists", chat_with(f'"x": [{",".join(["[]"] * 9_900_000)}]'))
    yield Body("3 million objects", chat_with(f'"x": [{",".join([opening + "1}"] * 3_000_000)}]'))
    yield Body("14 million numbers", chat_with(f'"x": [{",".join(["1"] * 14_000_000)}]'))
    yield Body("2 million fields", chat_with(",".join(f'"{number:x}":0' for number in range(2_000_000))))
    yield Body("500,000 equal keys", chat_with(",".join(['"user": "a"'] * 500_000)), may_pass=True)
    yield Body("two lists of messages", chat_with('"messages": []'), may_pass=True)
    yield Body("100,000 empty messages", chat(messages=[{}] * 100_000))
    yield Body("100,000 messages of an unknown role", chat(messages=[{"role": "x", "content": "a"}] * 100_000))
    yield Body("100,000 wrong tools", chat(tools=[{"type": 1}] * 100_000))
    yield Body("100,000 wrong parts", chat(messages=[{"role": "user", "content": [{"type": "x"}] * 100_000}]))
    yield Body("a key of 10 MB", chat_with(f'"{"a" * 10_000_000}": 1'), may_pass=True)
    yield Body("a role of 10 MB", chat(messages=[{"role": "a" * 10_000_000, "content": "a"}]))
    yield Body("a model of 10 MB", chat(model="a" * 10_000_000))
    yield Body("a message of 10 MB", chat(messages=[{"role": "user", "content": "a b " * 2_500_000}]))
    yield Body("a prompt of 10 MB", json.dumps({"prompt": "a b " * 2_500_000}).encode(), route="/v1/completions")
    tokens = json.dumps({"prompt": [10**9] * 1_000_000}).encode()
    yield Body("a prompt of 1 million unknown tokens", tokens, route="/v1/completions")
    prompts = json.dumps({"prompt": [["a"]] * 100_000}).encode()
    yield Body("100,000 wrong prompts", prompts, route="/v1/completions")


def numbers() -> Iterator[Body]:
    """Yield bodies with values out of range."""
    yield Body("NaN", chat_with('"temperature": NaN'))
    yield Body("infinity", chat_with('"top_p": Infinity'))
    yield Body("an integer of a million digits", chat_with(f'"seed": {"9" * 1_000_000}'))
    yield Body("a number of a million digits", chat_with(f'"temperature": 0.{"1" * 1_000_000}'), may_pass=True)
    yield Body("an exponent of a million digits", chat_with(f'"temperature": 1e{"9" * 1_000_000}'))
    yield Body("10,000 answers", chat(n=10_000))
    yield Body("10⁹ answers", chat(n=10**9))
    yield Body("minus one answer", chat(n=-1))
    yield Body("10³⁰ tokens", chat_with('"max_tokens": 1e30'))
    yield Body("10³⁰ tokens as an integer", chat(max_tokens=10**30))
    yield Body("minus one token", chat(max_tokens=-1))
    yield Body("10⁹ log probabilities", chat(logprobs=True, top_logprobs=10**9))
    yield Body("10⁹ prompt log probabilities", chat(prompt_logprobs=10**9))
    yield Body("all log probabilities", chat(logprobs=True, top_logprobs=-1))
    yield Body("a stop list of 100,000 numbers", chat(stop=[1] * 100_000))
    yield Body("a stop list of 100,000 texts", chat(stop=["zq"] * 100_000), may_pass=True)
    yield Body("stop tokens that do not exist", chat(stop_token_ids=[10**30] * 100_000))
    yield Body("biases of 100,000 tokens", chat(logit_bias={str(number): 1 for number in range(100_000)}))
    yield Body("biases of texts", chat(logit_bias={"a": 1}))
    yield Body("an infinite bias", chat_with('"logit_bias": {"1": Infinity}'), may_pass=True)
    yield Body("100,000 bad words", chat(bad_words=["zq"] * 100_000), may_pass=True)
    yield Body("an endless bad word", chat(bad_words=["z" * 5_000_000]), may_pass=True)
    best_of = json.dumps({"prompt": "a", "n": 2, "best_of": 10_000, "max_tokens": 4}).encode()
    yield Body("the best of 10,000", best_of, may_pass=True, route="/v1/completions")
    yield Body("a priority of 10³⁰", chat(priority=10**30))
    yield Body("a prompt cut to 10³⁰ tokens", chat(truncate_prompt_tokens=10**30))


def forms() -> Iterator[Body]:
    """Yield bodies in other forms than JSON."""
    text = chat()
    yield Body("gzip", gzip.compress(text), headers={**JSON, "content-encoding": "gzip"})
    yield Body("a gzip bomb", gzip.compress(bytes(100_000_000)), headers={**JSON, "content-encoding": "gzip"})
    yield Body("plain text", text, headers={"content-type": "text/plain"}, may_pass=True)
    yield Body("no content type", text, headers={}, may_pass=True)
    yield Body(
        "a content type of 20 kB", text, headers={"content-type": "application/json" + ";a=b" * 5000}, may_pass=True
    )
    form = {"content-type": "application/x-www-form-urlencoded"}
    yield Body("a form", b"model=tiny&messages=a", headers=form)
    yield Body("a form of 1,000,000 fields", b"&".join([b"a=b"] * 1_000_000), headers=form)
    multipart = {"content-type": "multipart/form-data; boundary=x"}
    part = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\na\r\n'
    yield Body("a multipart form", part * 100 + b"--x--\r\n", headers=multipart)
    yield Body("a multipart form of 100,000 parts", part * 100_000 + b"--x--\r\n", headers=multipart)
    yield Body("a multipart form without an end", part * 100, headers=multipart)


def templates() -> Iterator[Body]:
    """Yield bodies that ask for costly work in the chat template or while media are loaded."""
    loop = "{% for a in range(100000) %}{% for b in range(100000) %}{{ a * b }}{% endfor %}{% endfor %}"
    yield Body("a chat template", chat(chat_template=loop))
    yield Body("a chat template in its arguments", chat(chat_template_kwargs={"chat_template": loop}), may_pass=True)
    yield Body("a wrong argument for the chat template", chat(chat_template_kwargs={"messages": 1}), may_pass=True)
    yield Body("a decoder of its own", chat(media_io_kwargs={"image": {"image_mode": "XYZ"}}), may_pass=True)
    yield Body("a video of 10⁹ frames", chat(media_io_kwargs={"video": {"num_frames": 10**9}}), may_pass=True)
    yield Body("pixels of its own", chat(mm_processor_kwargs={"max_pixels": 10**12}), may_pass=True)
    yield Body(
        "a size of its own", chat(mm_processor_kwargs={"size": {"height": 10**6, "width": 10**6}}), may_pass=True
    )
    yield Body("embeddings as an image", chat_about("image_embeds", "gASV"))


CHAT_FIELDS = """
messages model frequency_penalty logit_bias logprobs top_logprobs max_tokens max_completion_tokens n presence_penalty
response_format seed stop stream stream_options temperature top_p tools tool_choice reasoning_effort
thinking_token_budget include_reasoning parallel_tool_calls user use_beam_search top_k min_p repetition_penalty
watermarking length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens skip_special_tokens
spaces_between_special_tokens truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids
allowed_token_ids bad_words echo add_generation_prompt continue_final_message add_special_tokens documents
chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs structured_outputs priority request_id session_id
return_tokens_as_token_ids return_token_ids routed_experts_prompt_start return_token_offsets return_prompt_text
mm_payload return_mm_kwargs cache_salt kv_transfer_params ec_transfer_params vllm_xargs repetition_detection
stream_interval
""".split()
WRONG_VALUES: tuple[Any, ...] = (None, True, -1, 10**30, 1e300, "", "wrong", [], [[]], [None], {}, {"a": {"a": None}})


def fields() -> Iterator[Body]:
    """Yield chats in which one field has a wrong value, for every field and many values."""
    for field in CHAT_FIELDS:
        for value in WRONG_VALUES:
            # `max_tokens` and this one limit the answer: one of them is always right.
            yield Body(f"{field}: {value}", chat(**{"max_completion_tokens": 2, field: value}), may_pass=True)


# ---- Structured output


def _objects(depth: int) -> dict[str, Any]:
    """Return a JSON schema of objects in objects, each with three."""
    schema: dict[str, Any] = {"type": "string", "maxLength": 100_000}
    for _ in range(depth):
        schema = {"type": "object", "properties": dict.fromkeys("abc", schema), "required": ["a"]}
    return schema


def _schema(schema: dict[str, Any]) -> bytes:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})


def _structured(**outputs: Any) -> bytes:
    return chat(structured_outputs=outputs)


def grammars() -> Iterator[Body]:
    """Yield constraints of the answer that take long to compile. Some of them do not with some compilers."""
    yield Body("a regex of nested repetitions", _structured(regex="((a{1,1000}){1,1000}){1,1000}"), may_pass=True)
    yield Body("a regex of 5,000 stars", _structured(regex="(.*a){5000}"), may_pass=True)
    yield Body(
        "a grammar of nested repetitions",
        _structured(grammar='root ::= (("a"{1,1000}){1,1000}){1,1000}'),
        may_pass=True,
    )
    rules = ["root ::= r0", *(f"r{n} ::= r{n + 1} r{n + 1}" for n in range(60)), 'r60 ::= "a" | "b"']
    yield Body("a grammar that doubles 60 times", _structured(grammar="\n".join(rules)), may_pass=True)
    many = ["root ::= r0", *(f'r{n} ::= "a" r{n + 1} | "b" r{n + 1}' for n in range(100_000)), 'r100000 ::= "a"']
    yield Body("a grammar of 100,000 rules", _structured(grammar="\n".join(many)), may_pass=True)
    yield Body(
        "a choice of 200,000", _structured(choice=[f"choice {number}" for number in range(200_000)]), may_pass=True
    )
    yield Body("a choice of 10 MB", _structured(choice=["a" * 10_000_000, "b"]), may_pass=True)
    yield Body("an enum of 200,000", _schema({"enum": [f"value {number}" for number in range(200_000)]}), may_pass=True)
    text = {"type": "string", "minLength": 900_000, "maxLength": 1_000_000}
    yield Body(
        "a schema of a million characters",
        _schema({"type": "array", "items": text, "minItems": 100_000}),
        may_pass=True,
    )
    yield Body("a schema of 3¹⁰ objects", _schema(_objects(10)), may_pass=True)
    properties = {f"p{number}": {"type": "string", "pattern": "(a|b)*c{1,500}"} for number in range(5000)}
    yield Body("a schema of 5,000 patterns", _schema({"type": "object", "properties": properties}), may_pass=True)
