"""LoRA adapters that requests name, on the real engine: answers, errors, the list of models, and log lines.

The worker keeps two adapters. `LORA_MODULES` names the same adapters that requests load, so that every answer can be
compared with that of an adapter that was loaded at the start.
"""

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import API_KEY
from tests.end_to_end.conftest import AdapterWorker
from tests.end_to_end.test_examples import run
from tests.support import adapters, media
from tests.support.adapters import files_of, write

WRONG = adapters.wrong()
STYLES = {"tiny": "The image is red.", "french": "L'image est rouge.", "upper": "RED!"}
IMAGE = {"type": "image_url", "image_url": {"url": media.image_url("red")}}
QUESTIONS: dict[str, dict[str, Any]] = {
    "greeting": {"messages": [{"role": "user", "content": "Hello"}]},
    "image": {"messages": [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What is this?"}]}]},
    "long": {"messages": [{"role": "user", "content": "word " * 300}]},
    "completion": {"prompt": "Once upon a time"},
}


HITS = "vllm:prefix_cache_hits_total{"
WAYS = ("http", "http stream", "job", "job stream")


def body_of(model: str, question: str, stream: bool = False) -> dict[str, Any]:
    return {**QUESTIONS[question], "model": model, "max_tokens": 40, "temperature": 0, "seed": 1, "stream": stream}


def path_of(question: str) -> str:
    return "/v1/completions" if "prompt" in QUESTIONS[question] else "/v1/chat/completions"


def ask(worker: AdapterWorker, model: str, question: str = "greeting", way: str = "http") -> tuple[int, Any]:
    """Return the status, and the answer's text, or the error."""
    body = body_of(model, question, way.endswith("stream"))
    if way.startswith("http"):
        with worker.client() as client:
            answer = client.post(path_of(question), json=body)
        if answer.status_code != 200:
            return answer.status_code, answer.json()["error"]
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
        chunks = [json.loads(line) for line in lines] if body["stream"] else [answer.json()]
    else:
        job = httpx.post(f"{worker.endpoint.url}/runsync", json={"input": body}, timeout=60).json()
        if job["status"] != "COMPLETED":
            error = json.loads(job["error"])
            return error["code"], error
        chunks = [chunk for part in job["output"] for chunk in (part if body["stream"] else [part])]
    assert {chunk["model"] for chunk in chunks} == {model}
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    key = "text" if "prompt" in body else "delta" if body["stream"] else "message"
    parts = [choice[key] for choice in choices]
    return 200, "".join((part if isinstance(part, str) else part.get("content")) or "" for part in parts)


def text(worker: AdapterWorker, model: str, question: str = "greeting", way: str = "http") -> str:
    status, answer = ask(worker, model, question, way)
    assert status == 200, answer
    return str(answer)


def cache_hits(worker: AdapterWorker) -> float:
    """Return how many tokens vLLM has taken from its prefix cache."""
    with worker.client() as client:
        metrics = client.get("/metrics").text
    return sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(HITS))


def test_concurrent_requests_get_the_answers_of_their_adapters(adapter_worker: AdapterWorker) -> None:
    """Seven models share two places. All answers are those that the static adapters give one by one."""
    same = {"tiny": "tiny", **{name: f"static-{name}" for name in ("french", "upper")}}
    expected = {
        (name, question): text(adapter_worker, static, question)
        for (name, static), question in product(same.items(), QUESTIONS)
    }
    assert {name: expected[name, "image"] for name in same} == STYLES
    assert len(set(expected.values())) == len(expected)
    models = [*same, "static-french", "static-upper", "my-org/french", "my-org/upper"]
    requests = list(product(models, QUESTIONS, WAYS))
    with ThreadPoolExecutor(24) as pool:
        texts = list(pool.map(lambda request: text(adapter_worker, *request), requests))
    styles = [model.removeprefix("my-org/").removeprefix("static-") for model, _, _ in requests]
    wanted = [expected[style, question] for style, (_, question, _) in zip(styles, requests, strict=True)]
    assert texts == wanted
    log = adapter_worker.endpoint.log.read_text()
    assert "Unloaded the LoRA adapter" in log
    lines = [json.loads(line) for line in log.rpartition("\n")[0].splitlines() if '"route": "/v1/' in line]
    assert {line["adapter"] for line in lines if line["output_tokens"]} == {None, *models} - {"tiny"}


def test_the_download_happens_once_and_others_go_on(adapter_worker: AdapterWorker) -> None:
    adapter_worker.hub.repositories["my-org/slow"] = files_of("upper")
    adapter_worker.hub.seconds = 1.5
    adapter_worker.hub.requests.clear()
    with ThreadPoolExecutor(8) as pool:
        slow = [pool.submit(text, adapter_worker, "my-org/slow") for _ in range(7)]
        while not adapter_worker.hub.requests:
            time.sleep(0.02)
        assert text(adapter_worker, "tiny") == "Hello! How can I help you?"
        assert not any(each.done() for each in slow)
        assert {each.result() for each in slow} == {"HELLO!"}
    adapter_worker.hub.seconds = 0.0
    assert adapter_worker.endpoint.log.read_text().count("Downloading my-org/slow") == 1


def test_other_routes(adapter_worker: AdapterWorker) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    with adapter_worker.client() as client:
        for name, hello in (("upper", "HELLO!"), ("french", "Bonjour."), ("my-org/upper", "HELLO!")):
            body: dict[str, Any] = {"model": name, "max_tokens": 20, "messages": messages}
            message = client.post("/v1/messages", json=body).json()
            assert (message["model"], message["content"][0]["text"]) == (name, hello)
            answer = client.post("/v1/responses", json={"model": name, "input": "Hello"}).json()
            assert (answer["model"], answer["output"][0]["content"][0]["text"]) == (name, hello)
            assert client.post("/tokenize", json={"model": name, "prompt": "Hello"}).json()["count"] == 1


def test_the_tokens_of_an_adapter_are_counted_for_it(adapter_worker: AdapterWorker) -> None:
    with adapter_worker.client() as client:
        before = tokens(client)
        answer = client.post("/v1/completions", json={"model": "my-org/french", "prompt": "Hello", "max_tokens": 5})
        usage = answer.json()["usage"]
        # The metrics change shortly after the answer.
        deadline = time.monotonic() + 10
        while (grown := tokens(client) - before)["worker"] == 0 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert grown == {"worker": usage["total_tokens"], "engine": usage["total_tokens"]}


def tokens(client: httpx.Client) -> Counter[str]:
    """Return how many tokens the adapter my-org/french has used so far, and how many the engine has processed."""
    counts: Counter[str] = Counter()
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            if sample.name == "worker_tokens_total" and sample.labels["adapter"] == "my-org/french":
                counts["worker"] += int(sample.value)
            elif sample.name in ("vllm:prompt_tokens_total", "vllm:generation_tokens_total"):
                counts["engine"] += int(sample.value)
    return counts


def test_openai_client(adapter_worker: AdapterWorker) -> None:
    client = openai.OpenAI(base_url=f"{adapter_worker.url}/v1", api_key=API_KEY, max_retries=0)
    answer = client.chat.completions.create(model="french", messages=[{"role": "user", "content": "Hello"}])
    assert (answer.model, answer.choices[0].message.content) == ("french", "Bonjour.")
    with pytest.raises(openai.PermissionDeniedError, match="LORA_ALLOW does not allow it"):
        client.chat.completions.create(model="other/adapter", messages=[{"role": "user", "content": "Hello"}])


def test_the_example(adapter_worker: AdapterWorker) -> None:
    answer = run("client.py", "Hello", "--base-url", f"{adapter_worker.url}/v1", "--model", "my-org/upper")
    assert answer.stdout == "HELLO!\n"


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_adapter_is_refused(adapter_worker: AdapterWorker, name: str) -> None:
    write(adapter_worker.folder / name, WRONG[name][0])
    status, error = ask(adapter_worker, name)
    assert (status, error["param"], error["code"]) == (400, "model", 400)
    assert repr(name) in error["message"]
    assert WRONG[name][1] in error["message"]
    assert str(adapter_worker.folder) not in error["message"]
    assert text(adapter_worker, "french") == "Bonjour."


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        pytest.param("other/adapter", 403, "LORA_ALLOW does not allow it", id="not allowed"),
        pytest.param("my-org/../../french", 404, "There is no model and no LoRA adapter", id="a path"),
        pytest.param("missing", 404, "There is no model and no LoRA adapter", id="no such folder"),
        pytest.param("gpt-9", 404, "does not exist", id="no adapter's name"),
        pytest.param(
            "my-org/none", 404, "has no LoRA adapter 'my-org/none', or it is private", id="unknown to the Hub"
        ),
        pytest.param("my-org/pickled", 400, "the repository has no adapter_model.safetensors", id="pickled weights"),
        pytest.param("my-org/large", 400, "at most", id="too large"),
        pytest.param("my-org/wrong", 400, "was trained for 'org/gpt-9'", id="of another model"),
    ],
)
def test_a_wrong_name_is_refused(adapter_worker: AdapterWorker, name: str, status: int, message: str) -> None:
    adapter_worker.hub.repositories["my-org/pickled"] = WRONG["pickled"][0]
    adapter_worker.hub.repositories["my-org/large"] = WRONG["too-large"][0]
    adapter_worker.hub.repositories["my-org/wrong"] = WRONG["other-model"][0]
    for way in ("http", "job"):
        answer = ask(adapter_worker, name, way=way)
        assert answer[0] == status
        assert message in answer[1]["message"]
    assert text(adapter_worker, "tiny") == "Hello! How can I help you?"


def test_a_hub_that_fails(adapter_worker: AdapterWorker) -> None:
    adapter_worker.hub.error = (500, "")
    status, error = ask(adapter_worker, "my-org/later")
    assert (status, error["type"]) == (503, "ServiceUnavailableError")
    assert "could not be fetched from the Hugging Face Hub" in error["message"]
    adapter_worker.hub.error = None
    adapter_worker.hub.repositories["my-org/later"] = files_of("upper")
    assert text(adapter_worker, "my-org/later") == "HELLO!"


def test_a_changed_folder_counts_when_it_is_loaded_again(adapter_worker: AdapterWorker) -> None:
    """vLLM's prefix cache has nothing of the old adapter for the new one, whose name is the same."""
    write(adapter_worker.folder / "changing", files_of("french"))
    assert text(adapter_worker, "changing", "long") == text(adapter_worker, "static-french", "long")
    hits = cache_hits(adapter_worker)
    assert text(adapter_worker, "changing", "long") == text(adapter_worker, "static-french", "long")
    assert cache_hits(adapter_worker) > hits
    write(adapter_worker.folder / "changing", files_of("upper"))
    for name in ("french", "upper"):
        text(adapter_worker, name)
    assert text(adapter_worker, "changing", "long") == text(adapter_worker, "static-upper", "long")
    # The worker has a copy: nothing happens to the adapter in use.
    write(adapter_worker.folder / "changing", {})
    assert text(adapter_worker, "changing", "long") == text(adapter_worker, "static-upper", "long")


def test_the_list_of_models(adapter_worker: AdapterWorker) -> None:
    text(adapter_worker, "my-org/french")
    with adapter_worker.client() as client:
        models = [card["id"] for card in client.get("/v1/models").json()["data"]]
    assert models[0] == "tiny"
    assert {"tiny", "static-french", "static-upper", "french", "upper", "my-org/french"} <= set(models)
    assert "my-org/*" not in models
    with adapter_worker.client() as client:
        info = client.get("/info").json()
        assert client.get("/health").status_code == httpx.codes.OK
    assert "my-org/*" in info["settings"]["lora_allow"]
