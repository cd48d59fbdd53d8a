"""The queue worker from end to end: real clients → stand-in platform → real SDK → handler.py → real engine."""

import base64
import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import runpod
from openai.types.chat import ChatCompletionMessageParam

from standin import Status
from tests.conftest import Endpoint
from tests.support import media
from tests.support.media import COLOURS, image_url

MODEL = "tiny"
GREETING = "Hello! How can I help you?"
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
WEATHER_TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def client(endpoint: Endpoint) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=endpoint.server.openai_base_url, api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def sdk(endpoint: Endpoint) -> Iterator[runpod.Endpoint]:
    sdk = runpod.Endpoint("local", api_key="any")
    sdk.rp_client.endpoint_url_base = endpoint.server.base_url_v2
    yield sdk
    sdk.rp_client.rp_session.close()


def run_sync(endpoint: Endpoint, job_input: object) -> dict[str, Any]:
    body: dict[str, Any] = httpx.post(f"{endpoint.url}/runsync", json={"input": job_input}, timeout=60).json()
    return body


def output(endpoint: Endpoint, job_input: object) -> Any:
    """Return the output of a job that does not stream: its only yield."""
    result = run_sync(endpoint, job_input)
    assert result["status"] == "COMPLETED", result
    (chunk,) = result["output"]
    return chunk


def answer_text(body: dict[str, Any]) -> str:
    text: str = body["choices"][0]["message"]["content"]
    return text


def user(text: str, *urls: str) -> list[ChatCompletionMessageParam]:
    """Return a user's message with the images and videos at `urls`."""
    kinds = ["video_url" if "video" in url[:20] or url.endswith(".mp4") else "image_url" for url in urls]
    parts: Any = [{"type": kind, kind: {"url": url}} for kind, url in zip(kinds, urls, strict=True)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def ask(client: openai.OpenAI, messages: list[ChatCompletionMessageParam], stream: bool, **fields: Any) -> str:
    """Return the text of the answer, streamed or not."""
    fields = {"model": MODEL, "messages": messages, "max_tokens": 40, **fields}
    if not stream:
        return client.chat.completions.create(**fields).choices[0].message.content or ""
    chunks = client.chat.completions.create(**fields, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


both_ways = pytest.mark.parametrize(
    "stream", [pytest.param(False, id="not streaming"), pytest.param(True, id="streaming")]
)

# ---- Images and videos reach the model


@pytest.mark.parametrize("colour", COLOURS)
def test_an_image_as_bare_base64(endpoint: Endpoint, colour: str) -> None:
    picture = media.encoded(media.picture(colour))
    assert (
        answer_text(output(endpoint, {"prompt": "What colour is this?", "image": picture})) == f"The image is {colour}."
    )


@both_ways
@pytest.mark.parametrize("colour", COLOURS)
def test_an_image_through_openais_client(client: openai.OpenAI, colour: str, stream: bool) -> None:
    assert ask(client, user("What is this?", image_url(colour)), stream) == f"The image is {colour}."


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("size", [(28, 28), (600, 600), (300, 90), (40, 350)])
def test_image_sizes_and_formats(client: openai.OpenAI, size: tuple[int, int], kind: str) -> None:
    url = media.data_url(media.picture("orange", size, kind), f"image/{kind.lower()}")
    assert ask(client, user("Which colour?", url), stream=False) == "The image is orange."


@both_ways
def test_two_images_in_order(client: openai.OpenAI, stream: bool) -> None:
    urls = [image_url("red"), image_url("blue")]
    assert ask(client, user("What colours are these?", *urls), stream) == "The images are red and blue."
    assert ask(client, user("What colours are these?", *reversed(urls)), stream) == "The images are blue and red."


def test_two_images_in_the_shorthand(endpoint: Endpoint) -> None:
    pictures = [media.encoded(media.picture(colour)) for colour in ("green", "pink")]
    answer = answer_text(output(endpoint, {"prompt": "What are these?", "images": pictures}))
    assert answer == "The images are green and pink."


@both_ways
@pytest.mark.parametrize(("first", "last"), [("red", "blue"), ("yellow", "black"), ("white", "green")])
def test_a_video(client: openai.OpenAI, first: str, last: str, stream: bool) -> None:
    url = media.data_url(media.film(first, last), "video/mp4")
    answer = ask(client, user("What happens?", url), stream)
    assert answer == f"The video goes from {first} to {last}."


@pytest.mark.parametrize("key", ["video", "videos"])
def test_a_video_as_bare_base64(endpoint: Endpoint, key: str) -> None:
    video = media.encoded(media.film("blue", "orange"))
    answer = answer_text(output(endpoint, {"prompt": "What happens?", key: video if key == "video" else [video]}))
    assert answer == "The video goes from blue to orange."


def test_an_image_and_a_video_in_one_message(client: openai.OpenAI) -> None:
    urls = [image_url("green"), media.data_url(media.film("red", "blue"), "video/mp4")]
    answer = ask(client, user("What do you see?", *urls), stream=False)
    assert answer == "The image is green. The video goes from red to blue."


# ---- OpenAI's client


def test_models_list(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


@pytest.mark.parametrize("form", ["absent", "null", "empty"])
def test_a_get_route_with_each_form_of_input(endpoint: Endpoint, client: openai.OpenAI, form: Any) -> None:
    endpoint.server.platform.behaviour.get_input = form
    try:
        assert [model.id for model in client.models.list()] == [MODEL]
    finally:
        endpoint.server.platform.behaviour.get_input = "absent"


@both_ways
def test_characters_outside_ascii(client: openai.OpenAI, stream: bool) -> None:
    answer = ask(client, user("Say hello in Japanese"), stream)
    assert answer == "こんにちは、世界！🌸🚀"


@both_ways
def test_a_tool_call(client: openai.OpenAI, stream: bool) -> None:
    fields: Any = {"model": MODEL, "messages": user("What is the weather in Paris?"), "tools": [WEATHER_TOOL]}
    if stream:
        deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**fields, stream=True)]
        calls = [call for delta in deltas for call in delta.tool_calls or []]
        name = "".join(call.function.name or "" for call in calls if call.function)
        arguments = "".join(call.function.arguments or "" for call in calls if call.function)
    else:
        (call,) = client.chat.completions.create(**fields).choices[0].message.tool_calls
        name, arguments = call.function.name, call.function.arguments
    assert (name, json.loads(arguments)) == ("get_weather", {"city": "Paris"})


def test_reasoning_is_separate_from_the_answer(client: openai.OpenAI) -> None:
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    answer = client.chat.completions.create(model=MODEL, messages=user("What is 2 plus 3?"), extra_body=thinking)
    message = answer.choices[0].message.model_dump()
    assert (message["reasoning"].strip(), message["content"].strip()) == ("2 plus 3 is 5.", "The answer is 5.")


def test_a_long_stream_has_the_same_text_as_the_complete_answer(client: openai.OpenAI) -> None:
    question = user("Tell me a story")
    complete = client.chat.completions.create(model=MODEL, messages=question, max_tokens=400)
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=question, max_tokens=400, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == answer_text(
        complete.model_dump()
    )
    assert chunks[-1].usage == complete.usage
    assert complete.usage is not None
    assert complete.usage.completion_tokens > 100


def test_concurrent_requests_each_get_their_own_answer(client: openai.OpenAI) -> None:
    colours = [COLOURS[index % len(COLOURS)] for index in range(40)]
    with ThreadPoolExecutor(16) as pool:
        answers = pool.map(lambda colour: ask(client, user("What is this?", image_url(colour)), stream=True), colours)
        assert list(answers) == [f"The image is {colour}." for colour in colours]


# ---- Other input shapes and routes


def test_runpods_own_client(sdk: runpod.Endpoint) -> None:
    job_input = {"messages": user("Hello"), "max_tokens": 20}
    assert answer_text(sdk.run_sync({"input": job_input})[0]) == GREETING
    lists = list(sdk.run({"input": {**job_input, "stream": True}}).stream())
    chunks = [chunk for chunks in lists for chunk in chunks]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == GREETING


def test_the_final_output_of_a_streamed_job_is_complete(endpoint: Endpoint) -> None:
    result = run_sync(endpoint, {"messages": user("Hello"), "stream": True})
    chunks = [chunk for chunks in result["output"] for chunk in chunks]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == GREETING


def test_a_completion_and_a_chat_from_a_prompt(endpoint: Endpoint) -> None:
    completion = output(endpoint, {"prompt": "Once upon a time", "sampling_params": {"max_tokens": 5}})
    assert (completion["object"], completion["usage"]["completion_tokens"]) == ("text_completion", 5)
    assert answer_text(output(endpoint, {"prompt": "Hello", "apply_chat_template": True})) == GREETING


@pytest.mark.parametrize("shape", ["openai", "route"])
def test_other_routes(endpoint: Endpoint, shape: str) -> None:
    def call(route: str, body: dict[str, Any] | None = None) -> Any:
        keys = ("openai_route", "openai_input") if shape == "openai" else ("route", "body")
        return output(endpoint, {keys[0]: route} | ({} if body is None else {keys[1]: body}))

    tokens = call("/tokenize", {"model": MODEL, "prompt": "Hello"})["tokens"]
    assert call("/detokenize", {"model": MODEL, "tokens": tokens})["prompt"] == "Hello"
    answer = call("/v1/responses", {"model": MODEL, "input": "Hello", "max_output_tokens": 40})
    assert answer["output"][-1]["content"][0]["text"] == GREETING
    message = call(
        "/v1/messages", {"model": MODEL, "max_tokens": 40, "messages": [{"role": "user", "content": "Hello"}]}
    )
    assert message["content"][-1]["text"] == GREETING
    assert call("/version")["version"] == "0.32.0"
    assert call("/health")["status"] == "ready"
    assert "\nvllm:num_requests_running{" in call("/metrics")


# ---- Errors: callers get the message, and the worker continues

BROKEN_IMAGE = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"garbage" * 20).decode()
WRONG_INPUTS = [
    pytest.param(
        {"openai_route": "/v1/chat/completions", "openai_input": {**CHAT, "model": "gpt-9"}},
        404,
        "The model `gpt-9` does not exist.",
        id="unknown model",
    ),
    pytest.param(
        {"openai_route": "/v1/chat/completions", "openai_input": {**CHAT, "temperature": "hot"}},
        400,
        "temperature",
        id="wrong field",
    ),
    pytest.param(
        {"openai_route": "/v1/chat/completions", "openai_input": {"messages": user("a " * 5000)}},
        400,
        "maximum context length is 2048 tokens",
        id="prompt too long",
    ),
    pytest.param(
        {"openai_route": "/v1/nothing", "openai_input": CHAT}, 404, "No route '/v1/nothing'", id="unknown route"
    ),
    pytest.param({"prompt": "?", "image": BROKEN_IMAGE}, 400, "image", id="broken image"),
    pytest.param(
        {"openai_route": "/v1/chat/completions", "openai_input": {"messages": user("?", "data:image/png;base64,!!!")}},
        400,
        "",
        id="broken base64",
    ),
    pytest.param({"text": "Hello"}, 400, "It must have one of 'messages', 'prompt'", id="unknown shape"),
    pytest.param("Hello", 400, "must be a JSON object, not a string", id="not an object"),
    pytest.param({"messages": []}, 400, "", id="no messages"),
]


@pytest.mark.parametrize(("job_input", "code", "message"), WRONG_INPUTS)
def test_a_wrong_input_fails_the_job_with_a_message(
    endpoint: Endpoint, job_input: Any, code: int, message: str
) -> None:
    result = run_sync(endpoint, job_input)
    assert result["status"] == "FAILED"
    error = json.loads(result["error"])
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert message in error["message"]
    assert error["message"]
    assert "Traceback" not in result["error"]
    assert answer_text(output(endpoint, {"messages": user("Hello")})) == GREETING


@pytest.mark.parametrize(
    ("job_input", "message"),
    [
        pytest.param(case.values[0], case.values[2], id=case.id)
        for case in WRONG_INPUTS
        if isinstance(case.values[0], dict) and "openai_route" in case.values[0]
    ],
)
def test_a_wrong_input_of_a_stream_is_an_error_event(endpoint: Endpoint, job_input: Any, message: str) -> None:
    url = f"{endpoint.url}/openai{job_input['openai_route']}"
    answer = httpx.post(url, json={**job_input["openai_input"], "stream": True}, timeout=30)
    event, done, rest = answer.text.split("\n\n")
    assert (answer.status_code, done, rest) == (200, "data: [DONE]", "")
    assert message in json.loads(event.removeprefix("data: "))["error"]["message"]


def test_openais_client_raises_an_error_event(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIError, match="The model `gpt-9` does not exist"):
        ask(client, user("Hello"), stream=True, model="gpt-9")


# ---- Cancellation and tokens

ENDLESS = {"prompt": "Once upon a time", "max_tokens": 1900, "ignore_eos": True, "stream": True}


def engine_is_idle(endpoint: Endpoint) -> bool:
    """Read the engine's gauge of running requests, after a short job that updates it."""
    output(endpoint, {"prompt": "Hello", "max_tokens": 1})
    (value,) = re.findall(
        r"^vllm:num_requests_running\{.*\} (.*)$", output(endpoint, {"route": "/metrics"}), re.MULTILINE
    )
    return float(value) == 0


def job_line(endpoint: Endpoint, job_id: str) -> dict[str, Any]:
    """Wait for the log line that ends a job, and return it."""
    for _ in range(100):
        for text in endpoint.log.read_text().splitlines():
            if job_id in text and text.startswith("{") and "outcome" in (line := json.loads(text)):
                return dict(line)
        time.sleep(0.05)
    pytest.fail(f"The log has no line for the end of job {job_id}.")


def cancelled_tokens(endpoint: Endpoint, job_id: str) -> int:
    """Return how many tokens were generated for a cancelled job."""
    line = job_line(endpoint, job_id)
    assert line["outcome"] == "cancelled"
    return int(line["output_tokens"])


def test_a_cancelled_job_frees_the_engine(endpoint: Endpoint, sdk: runpod.Endpoint) -> None:
    job = sdk.run({"input": ENDLESS})
    endpoint.server.wait_until(lambda platform: platform.jobs[job.job_id].chunks)
    job.cancel()
    assert 0 < cancelled_tokens(endpoint, job.job_id) < 1900
    assert engine_is_idle(endpoint)


def test_a_cancelled_job_that_does_not_stream_frees_the_engine(endpoint: Endpoint, sdk: runpod.Endpoint) -> None:
    job = sdk.run({"input": {**ENDLESS, "stream": False}})
    endpoint.server.wait_until(lambda platform: platform.jobs[job.job_id].taken)
    time.sleep(0.2)
    job.cancel()
    assert cancelled_tokens(endpoint, job.job_id) < 1900
    assert engine_is_idle(endpoint)


def test_a_client_that_disconnects_from_its_stream_frees_the_engine(endpoint: Endpoint, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt="Once", max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
    )
    job_id = next(iter(stream)).id.removeprefix("cmpl-")
    stream.close()
    assert cancelled_tokens(endpoint, job_id) < 1900
    assert engine_is_idle(endpoint)


def test_cancelling_a_job_closes_the_connection_that_fetches_its_image(
    endpoint: Endpoint, sdk: runpod.Endpoint
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/slow.png"
        job = sdk.run({"input": {"prompt": "?", "image": url}})
        connection, _ = server.accept()
        with connection:
            connection.settimeout(20)
            assert connection.recv(4096)
            job.cancel()
            assert job_line(endpoint, job.job_id)["outcome"] == "cancelled"
            assert connection.recv(4096) == b""


def assert_tokens(endpoint: Endpoint, job_id: str, usage: dict[str, Any]) -> None:
    line = job_line(endpoint, job_id)
    assert (line["input_tokens"], line["output_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])


def test_the_tokens_of_a_stream_without_usage_are_logged(endpoint: Endpoint) -> None:
    result = run_sync(endpoint, {"messages": user("Hello"), "stream": True})
    usage = output(endpoint, {"messages": user("Hello")})["usage"]
    assert_tokens(endpoint, result["id"], usage)
    assert not any("usage" in chunk for chunks in result["output"] for chunk in chunks)


def test_the_prompt_of_several_answers_counts_once(endpoint: Endpoint) -> None:
    result = run_sync(endpoint, {"messages": user("Hello"), "n": 3, "temperature": 0.1})
    usage = result["output"][0]["usage"]
    assert_tokens(endpoint, result["id"], usage)


# ---- Metrics and log


def test_metrics_can_be_read_from_their_own_port_and_through_a_job(endpoint: Endpoint) -> None:
    url = f"http://127.0.0.1:{endpoint.metrics_port}"
    output(endpoint, {"prompt": "What?", "image": image_url("red")})
    httpx.post(f"{endpoint.url}/openai/v1/chat/completions", json=CHAT | {"stream": True}, timeout=60)
    direct, through_job = httpx.get(f"{url}/metrics").text, output(endpoint, {"route": "/metrics"})
    for text in (direct, through_job):
        assert re.search(r'^worker_jobs_total\{modality="image",outcome="ok",.*\} [1-9]', text, re.MULTILINE)
        assert re.search(r"^worker_stream_posts_total [1-9]", text, re.MULTILINE)
        assert re.search(r"^vllm:num_requests_running", text, re.MULTILINE)
    assert httpx.get(f"{url}/ping").status_code == 200
    assert httpx.get(f"{url}/health").json()["status"] == "ready"
    assert httpx.get(f"{url}/info").json()["engine"]["max_model_len"] == 2048
    assert httpx.post(f"{url}/v1/chat/completions", json=CHAT).status_code == 404


def test_the_worker_and_vllm_log_in_the_same_format(endpoint: Endpoint) -> None:
    lines = [
        json.loads(line) for line in endpoint.log.read_text().rpartition("\n")[0].splitlines() if line.startswith("{")
    ]
    assert {line["logger"].partition(".")[0] for line in lines} >= {"worker", "vllm"}
    assert all("timestamp" in line for line in lines)


def test_the_log_holds_no_prompt_and_no_traceback(endpoint: Endpoint) -> None:
    prompt = "the word is xylophone"
    output(endpoint, {"prompt": prompt, "apply_chat_template": True})
    run_sync(endpoint, {"messages": [{"role": "user", "content": prompt, "extra": {}}], "temperature": prompt})
    log = endpoint.log.read_text()
    assert "xylophone" not in log
    assert "Traceback" not in log
    assert " ok after " in log


def test_no_result_is_posted_twice_or_late(endpoint: Endpoint) -> None:
    """Checks this test's job and the jobs of all tests before it."""
    run_sync(endpoint, {"messages": user("Hello"), "stream": True})
    platform = endpoint.server.platform
    cancelled = {job.id for job in platform.jobs.values() if job.status is Status.CANCELLED}
    assert cancelled >= set(platform.records.late_streams)
    assert (platform.records.duplicate_dones, platform.records.oversized_posts) == ([], [])
    assert any(take.batch_size > 1 for take in platform.records.takes)
