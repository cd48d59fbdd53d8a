"""Popular client libraries, used as in their documentation: through RunPod's OpenAI proxy, and over HTTP.

OpenAI's and RunPod's clients are in the main environment. `make clients` installs the other Python clients in
.venv-clients; those for Node are installed in tests/clients. Their scripts are in tests/clients.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest
import runpod
from pydantic import BaseModel

from tests.conftest import Endpoint, HttpWorker
from tests.support import media
from tests.support.tiny import ROOT

MODEL = "tiny"
GREETING = "Hello! How can I help you?"
HELLO: Any = [{"role": "user", "content": "Hello"}]
EXTRACT: Any = [{"role": "user", "content": "Extract the person: Ada is 36 years old."}]
PLATFORM_KEY = "key-of-the-platform"
CLIENTS = ROOT / "tests/clients"
PYTHON = ROOT / ".venv-clients/bin/python"


class Person(BaseModel):
    name: str
    age: int


ADA = Person(name="Ada", age=36)


@dataclass(frozen=True)
class Route:
    """The address and key of a worker."""

    name: str
    base_url: str
    api_key: str


@pytest.fixture(params=["queue", "http"])
def route(request: pytest.FixtureRequest) -> Iterator[Route]:
    """The queue worker and the HTTP worker. Both require the key."""
    if request.param == "http":
        worker: HttpWorker = request.getfixturevalue("http_worker")
        yield Route("http", f"{worker.url}/v1", worker.key)
        return
    endpoint: Endpoint = request.getfixturevalue("endpoint")
    endpoint.server.platform.behaviour.api_key = PLATFORM_KEY
    yield Route("queue", endpoint.server.openai_base_url, PLATFORM_KEY)
    endpoint.server.platform.behaviour.api_key = None


@pytest.fixture
def client(route: Route) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=route.base_url, api_key=route.api_key, max_retries=0) as client:
        yield client


def question(kind: str, url: str, text: str) -> Any:
    """Return a message with an image or video and a question about it."""
    return [{"role": "user", "content": [{"type": kind, kind: {"url": url}}, {"type": "text", "text": text}]}]


# ---- OpenAI's client


def test_openai_chat_without_and_with_streaming(client: openai.OpenAI) -> None:
    assert client.chat.completions.create(model=MODEL, messages=HELLO).choices[0].message.content == GREETING
    chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == GREETING


def test_openai_image_and_video(client: openai.OpenAI) -> None:
    look = question("image_url", media.image_url("red"), "What colour is this?")
    assert client.chat.completions.create(model=MODEL, messages=look).choices[0].message.content == "The image is red."
    watch = question("video_url", media.data_url(media.film("red", "blue"), "video/mp4"), "What happens?")
    answer = client.chat.completions.create(model=MODEL, messages=watch).choices[0].message.content
    assert answer == "The video goes from red to blue."


def test_openai_tools(client: openai.OpenAI) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tool: Any = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    fields: Any = {"model": MODEL, "messages": [{"role": "user", "content": "What is the weather in Paris?"}]}
    (call,) = client.chat.completions.create(**fields, tools=[tool]).choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    with client.chat.completions.stream(**fields, tools=[tool]) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert streamed.function.arguments == call.function.arguments


def test_openai_structured_output(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model=MODEL, messages=EXTRACT, response_format=Person)
    assert answer.choices[0].message.parsed == ADA
    with client.chat.completions.stream(model=MODEL, messages=EXTRACT, response_format=Person) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == ADA


def test_openai_responses(client: openai.OpenAI) -> None:
    assert client.responses.create(model=MODEL, input="Hello").output_text == GREETING
    with client.responses.stream(model=MODEL, input="Hello") as stream:
        assert "".join(event.delta for event in stream if event.type == "response.output_text.delta") == GREETING
        assert stream.get_final_response().output_text == GREETING
    assert client.responses.parse(model=MODEL, input=EXTRACT, text_format=Person).output_parsed == ADA


def test_openai_embeddings_fail_with_a_chat_model(client: openai.OpenAI, route: Route) -> None:
    """RunPod's proxy answers 500 without details for every job that fails."""
    with pytest.raises(openai.InternalServerError if route.name == "queue" else openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="Hello")
    assert client.chat.completions.create(model=MODEL, messages=HELLO).choices[0].message.content == GREETING


def test_openai_raises_an_authentication_error_for_a_wrong_key(route: Route) -> None:
    with (
        openai.OpenAI(base_url=route.base_url, api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.chat.completions.create(model=MODEL, messages=HELLO)


# ---- RunPod's client. Its run_sync, stream and cancel are tested in test_queue.py.


def test_runpods_client_waits_for_the_output_of_a_job(endpoint: Endpoint) -> None:
    sdk = runpod.Endpoint("local", api_key="any")
    sdk.rp_client.endpoint_url_base = endpoint.server.base_url_v2
    try:
        job = sdk.run({"input": {"messages": HELLO}})
        assert job.output(timeout=30)[0]["choices"][0]["message"]["content"] == GREETING
        assert job.status() == "COMPLETED"
        assert sdk.health()["jobs"]["completed"] >= 1
    finally:
        sdk.rp_client.rp_session.close()


# ---- Clients outside the main environment

EXPECTED = {
    "text": GREETING,
    "streamed": GREETING,
    "image": "The image is red.",
    "tool": [["get_weather", {"city": "Paris"}]],
}
OBJECT = {"object": {"name": "Ada", "age": 36}}


def run_client(command: list[str], route: Route) -> Any:
    """Run a client's script and return the JSON that it prints."""
    environment = {**os.environ, "BASE_URL": route.base_url, "API_KEY": route.api_key}
    return json.loads(output(command, environment | {"IMAGE_URL": media.image_url("red")}))


def output(command: list[str], environment: dict[str, str] | None = None) -> str:
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.skipif(not PYTHON.exists(), reason="`make clients` installs these clients")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("anthropic", EXPECTED),
        ("langchain", EXPECTED),
        ("litellm", EXPECTED),
        ("instructor", OBJECT | {"tool": {"city": "Paris"}}),
    ],
)
def test_a_python_client(route: Route, name: str, expected: dict[str, Any]) -> None:
    assert run_client([str(PYTHON), str(CLIENTS / f"{name}_client.py")], route) == expected


@pytest.fixture(scope="module")
def node() -> str:
    """The path of Node, once the clients are installed."""
    path, npm = shutil.which("node"), shutil.which("npm")
    if path is None or npm is None:
        pytest.skip("node or npm is not installed")
    command = [npm, "ci", "--no-audit", "--no-fund"]
    result = subprocess.run(command, cwd=CLIENTS, capture_output=True, text=True, timeout=100)
    if result.returncode:
        pytest.skip(f"npm could not install the clients: {result.stderr[-500:]}")
    return path


@pytest.mark.parametrize("name", ["openai", "ai-sdk"])
def test_a_node_client(route: Route, node: str, name: str) -> None:
    assert run_client([node, str(CLIENTS / f"{name}.mjs")], route) == EXPECTED | OBJECT


# ---- The examples in the README


def commands(language: str, word: str) -> list[str]:
    """Return the README's code blocks of a language that contain a word and call the local endpoint."""
    blocks: list[str] = re.findall(rf"(?ms)^```{language}\n(.*?)^```", (ROOT / "README.md").read_text())
    return [block for block in blocks if word in block and "127.0.0.1:8090" in block]


def with_port(endpoint: Endpoint, block: str) -> str:
    return block.replace("127.0.0.1:8090", f"127.0.0.1:{endpoint.server.port}")


def test_the_readme_has_examples_for_curl_and_openai() -> None:
    assert commands("sh", "curl")
    assert commands("python", "openai")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("block", commands("sh", "curl"))
def test_the_readmes_curl_example(endpoint: Endpoint, block: str) -> None:
    result = json.loads(output(["bash", "-euc", with_port(endpoint, block)]))
    assert result["status"] == "COMPLETED"
    assert result["output"]


@pytest.mark.parametrize("block", commands("python", "openai"))
def test_the_readmes_python_example(endpoint: Endpoint, block: str) -> None:
    assert output([sys.executable, "-c", with_port(endpoint, block)]).startswith("Once upon a time")
