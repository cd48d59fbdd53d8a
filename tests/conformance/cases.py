"""The requests of the conformance test. All are for the embedded model, at temperature 0."""

from dataclasses import dataclass
from typing import Any

from tests.support import media

Json = dict[str, Any]
CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
BOTH = (False, True)

IMAGE = {"type": "image_url", "image_url": {"url": media.image_url("red")}}
BLUE = {"type": "image_url", "image_url": {"url": media.image_url("blue")}}
VIDEO = {"type": "video_url", "video_url": {"url": media.data_url(media.film("red", "blue"), "video/mp4")}}
RED = media.encoded(media.picture("red"))
FUNCTION: Json = {
    "name": "get_weather",
    "description": "Get the current weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOL: Json = {"type": "function", "function": FUNCTION}
COLOUR: Json = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


def schema(json_schema: Json) -> Json:
    """Return the response format for JSON that matches a schema."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": json_schema}}


@dataclass(frozen=True, slots=True)
class Case:
    """One request."""

    name: str
    path: str
    body: Json | None = None
    method: str = "POST"

    @property
    def stream(self) -> bool:
        """Whether the response is a stream."""
        return bool(self.body and self.body.get("stream") is True)


def user(*content: Json | str) -> list[Json]:
    """Return a conversation of one message, whose content is text or a list of parts."""
    if len(content) == 1 and isinstance(content[0], str):
        return [{"role": "user", "content": content[0]}]
    parts = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in content]
    return [{"role": "user", "content": parts}]


def chat(*content: Json | str, **fields: Any) -> Json:
    return {"model": "tiny", "messages": user(*content), "temperature": 0, "seed": 1, "max_tokens": 40, **fields}


def text(prompt: Any = "Once upon a time", **fields: Any) -> Json:
    return {"model": "tiny", "prompt": prompt, "temperature": 0, "seed": 1, "max_tokens": 12, **fields}


def response(**fields: Any) -> Json:
    return {"model": "tiny", "input": "Hello", "temperature": 0, "max_output_tokens": 40, **fields}


def message(**fields: Any) -> Json:
    hello = [{"role": "user", "content": "Hello"}]
    return {"model": "tiny", "max_tokens": 40, "temperature": 0, "messages": hello, **fields}


def _both(name: str, path: str, body: Json) -> list[Case]:
    """Return a case twice: without and with streaming."""
    return [Case(name, path, body), Case(f"{name}, streaming", path, {**body, "stream": True})]


ASSISTANT = {"role": "assistant", "content": "Hello!"}
WEATHER = "What is the weather in Paris?"
THINKING = {"chat_template_kwargs": {"enable_thinking": True}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
RESPONSES_IMAGE = [
    {"type": "input_image", "image_url": media.image_url("red"), "detail": "auto"},
    {"type": "input_text", "text": "What colour is this?"},
]
MESSAGES_IMAGE = [
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": RED}},
    {"type": "text", "text": "What colour is this?"},
]
MESSAGES_TOOL = {
    "name": "get_weather",
    "description": "Get the current weather in a city.",
    "input_schema": FUNCTION["parameters"],
}
USAGE: Json = {"stream": True, "stream_options": {"include_usage": True}}
ALL_USAGE: Json = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}

ANSWERED = [
    *_both("chat", CHAT, chat("Hello")),
    *_both("chat of several turns", CHAT, {**chat(), "messages": [*user("Hi"), ASSISTANT, *user("Hello")]}),
    *_both("system message", CHAT, {**chat(), "messages": [{"role": "system", "content": "Brief."}, *user("Hello")]}),
    *_both("text outside ASCII", CHAT, chat("Say hello in Japanese")),
    *_both("image", CHAT, chat(IMAGE, "What colour is this?")),
    *_both("two images", CHAT, chat(IMAGE, BLUE, "What colours are these?")),
    *_both("video", CHAT, chat(VIDEO, "What happens?")),
    *_both("image and video", CHAT, chat(BLUE, VIDEO, "What do you see?")),
    *_both("tool", CHAT, chat(WEATHER, tools=[TOOL])),
    *_both("named tool", CHAT, chat("Hello", tools=[TOOL], tool_choice=NAMED)),
    *_both("required tool", CHAT, chat("Hello", tools=[TOOL], tool_choice="required")),
    *_both("tool_choice none", CHAT, chat("Hello", tools=[TOOL], tool_choice="none")),
    *_both("reasoning", CHAT, chat("What is 2 plus 3?", **THINKING)),
    *_both("reasoning not included", CHAT, chat("What is 2 plus 3?", **THINKING, include_reasoning=False)),
    *_both("JSON schema", CHAT, chat(IMAGE, "What colour is this?", response_format=schema(COLOUR))),
    *_both("JSON object", CHAT, chat("Hello", response_format={"type": "json_object"}, max_tokens=10)),
    *_both("regular expression", CHAT, chat("Hello", structured_outputs={"regex": "[ab]{3}"})),
    *_both("choice", CHAT, chat("Hello", structured_outputs={"choice": ["yes", "no"]})),
    *_both("log probabilities", CHAT, chat("Hello", logprobs=True, top_logprobs=2)),
    *_both("several choices", CHAT, chat("Hello", n=3)),
    *_both("stop", CHAT, chat("Hello", stop=["can"])),
    *_both("stop included", CHAT, chat("Hello", stop="can", include_stop_str_in_output=True)),
    *_both("length", CHAT, chat("Hello", max_tokens=3)),
    *_both("max_completion_tokens", CHAT, {**chat("Hello"), "max_completion_tokens": 3}),
    *_both("echo", CHAT, {**chat(echo=True, add_generation_prompt=False), "messages": [*user("Hi"), ASSISTANT]}),
    *_both("penalties", CHAT, chat("Hello", frequency_penalty=0.5, presence_penalty=0.5, repetition_penalty=1.2)),
    *_both("token ids", CHAT, chat("Hello", return_token_ids=True, max_tokens=3)),
    Case("usage", CHAT, chat("Hello", **USAGE)),
    Case("continuous usage", CHAT, chat("Hello", max_tokens=1, **ALL_USAGE)),
    *_both("completion", TEXT, text()),
    *_both("completion of several prompts", TEXT, text(["Once", "Hello"])),
    *_both("completion of token ids", TEXT, text([10, 11, 12])),
    *_both("completion with echo", TEXT, text(echo=True)),
    *_both("completion with log probabilities", TEXT, text(logprobs=2)),
    *_both("completion with the prompt's log probabilities", TEXT, text(prompt_logprobs=1, max_tokens=2)),
    *_both("completion with several choices", TEXT, text(n=2)),
    *_both("completion with stop", TEXT, text(stop=["a"])),
    *_both("response", RESPONSES, response()),
    *_both("response with instructions", RESPONSES, response(instructions="Be brief.")),
    *_both("response about an image", RESPONSES, response(input=[{"role": "user", "content": RESPONSES_IMAGE}])),
    *_both("response with a tool", RESPONSES, response(input=WEATHER, tools=[{"type": "function", **FUNCTION}])),
    *_both("message", MESSAGES, message()),
    *_both("message with a system text", MESSAGES, message(system="Be brief.")),
    *_both("message about an image", MESSAGES, message(messages=[{"role": "user", "content": MESSAGES_IMAGE}])),
    *_both("message with a tool", MESSAGES, message(messages=user(WEATHER), tools=[MESSAGES_TOOL])),
    Case("token count of a message", f"{MESSAGES}/count_tokens", {"model": "tiny", "messages": user("Hello")}),
    Case("models", "/v1/models", method="GET"),
    Case("version", "/version", method="GET"),
    Case("tokenized text", "/tokenize", {"model": "tiny", "prompt": "Hello"}),
    Case("tokenized chat", "/tokenize", {"model": "tiny", "messages": user("Hello")}),
    Case("detokenized text", "/detokenize", {"model": "tiny", "tokens": [10, 11, 12]}),
    Case("rendered chat", f"{CHAT}/render", chat("Hello")),
    Case("embeddings", "/v1/embeddings", {"model": "tiny", "input": "Hello"}),
    Case("score", "/v1/score", {"model": "tiny", "text_1": "a", "text_2": "b"}),
    Case("rerank", "/v1/rerank", {"model": "tiny", "query": "a", "documents": ["b"]}),
]

WRONG_CHATS: dict[str, Json] = {
    "unknown model": chat("Hello", model="gpt-9"),
    "no messages": {"model": "tiny"},
    "empty messages": {**chat("Hello"), "messages": []},
    "messages as text": {**chat("Hello"), "messages": "Hello"},
    "message without a role": {**chat("Hello"), "messages": [{"content": "Hello"}]},
    "unknown part": chat({"type": "smell"}, "Hello"),
    "image part without a link": chat({"type": "image_url"}, "Hello"),
    "temperature as text": chat("Hello", temperature="hot"),
    "temperature below zero": chat("Hello", temperature=-1),
    "top_p above one": chat("Hello", top_p=2),
    "top_k of -5": chat("Hello", top_k=-5),
    "n of zero": chat("Hello", n=0),
    "n as text": chat("Hello", n="many"),
    "max_tokens of zero": chat("Hello", max_tokens=0),
    "max_tokens below zero": chat("Hello", max_tokens=-1),
    "max_tokens beyond the context": chat("Hello", max_tokens=100_000),
    "prompt that is too long": chat("a " * 5000),
    "stop as a number": chat("Hello", stop=7),
    "too many log probabilities": chat("Hello", logprobs=True, top_logprobs=1000),
    "top_logprobs without logprobs": chat("Hello", top_logprobs=2),
    "tools as text": chat("Hello", tools="hammer"),
    "tool without a name": chat("Hello", tools=[{"type": "function", "function": {}}]),
    "tool_choice with an unknown tool": chat(
        "Hello", tools=[TOOL], tool_choice={"type": "function", "function": {"name": "x"}}
    ),
    "tool_choice without tools": chat("Hello", tool_choice="required"),
    "unknown tool_choice": chat("Hello", tools=[TOOL], tool_choice="maybe"),
    "json_schema without a schema": chat("Hello", response_format={"type": "json_schema"}),
    "invalid schema": chat("Hello", response_format=schema({"type": 7})),
    "unknown format": chat("Hello", response_format={"type": "poem"}),
    "invalid regular expression": chat("Hello", structured_outputs={"regex": "["}),
    "two kinds of structured output": chat("Hello", structured_outputs={"regex": "a", "choice": ["b"]}),
    "stream_options without a stream": chat("Hello", stream_options={"include_usage": True}),
    "stream as text": chat("Hello", stream="perhaps"),
    "template in a request": chat("Hello", chat_template="{{ messages }}"),
    "seed as text": chat("Hello", seed="x"),
    "logit bias of an unknown token": chat("Hello", logit_bias={"999999": 1}),
    "min_tokens above max_tokens": chat("Hello", min_tokens=50),
    "penalty that is too large": chat("Hello", presence_penalty=9),
    "repetition penalty of zero": chat("Hello", repetition_penalty=0),
}
WRONG = [
    *(Case(name, CHAT, body) for name, body in WRONG_CHATS.items()),
    Case("unknown model, streaming", CHAT, chat("Hello", model="gpt-9", stream=True)),
    Case("prompt that is too long, streaming", CHAT, chat("a " * 5000, stream=True)),
    Case("temperature as text, streaming", CHAT, chat("Hello", temperature="hot", stream=True)),
    Case("no prompt", TEXT, {"model": "tiny"}),
    Case("empty prompt", TEXT, text("")),
    Case("prompt as a number", TEXT, text(7)),
    Case("unknown token ids", TEXT, text([10, 999_999])),
    Case("log probabilities below zero", TEXT, text(logprobs=-3)),
    Case("too many log probabilities of the prompt", TEXT, text(prompt_logprobs=1000)),
    Case("response without input", RESPONSES, {"model": "tiny"}),
    Case("response to an unknown response", RESPONSES, response(previous_response_id="resp_none")),
    Case("response from an unknown model", RESPONSES, response(model="gpt-9")),
    Case("message without max_tokens", MESSAGES, {"model": "tiny", "messages": user("Hello")}),
    Case("message from an unknown model", MESSAGES, message(model="gpt-9")),
    Case("message with an unknown role", MESSAGES, message(messages=[{"role": "king", "content": "Hello"}])),
    Case("tokenize without a prompt", "/tokenize", {"model": "tiny"}),
    Case("detokenize words", "/detokenize", {"model": "tiny", "tokens": ["a"]}),
    Case("unknown response", "/v1/responses/resp_none", method="GET"),
]
