"""Images and videos through every route of the real engine, from the queue and over HTTP, streaming and not.

The embedded model names the colours of images and videos, in their order.
"""

import base64
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import API_KEY, HttpWorker
from tests.support import hostile, media
from tests.support.links import Server
from tests.support.media import COLOURS, image_url

MODEL = "tiny"
CHAT = "/v1/chat/completions"
Part = dict[str, Any]

FILM = media.data_url(media.film("red", "blue"), "video/mp4")


# ---- The same message in the formats of three routes


def chat_part(url: str, kind: str) -> Part:
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def responses_part(url: str, kind: str) -> Part:
    assert kind == "image", "this route has no videos, neither in OpenAI's API nor in vLLM"
    return {"type": "input_image", "image_url": url}


def messages_part(url: str, kind: str) -> Part:
    assert kind == "image", "this route has no videos, neither in Anthropic's API nor in vLLM"
    if not url.startswith("data:"):
        return {"type": "image", "source": {"type": "url", "url": url}}
    media_type, _, data = url.removeprefix("data:").partition(";base64,")
    return {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}


PARTS = {
    CHAT: chat_part,
    "/v1/responses": responses_part,
    "/v1/messages": messages_part,
}
TEXT = {CHAT: "text", "/v1/responses": "input_text", "/v1/messages": "text"}


def turn(route: str, text: str, *media_links: tuple[str, str], role: str = "user") -> Part:
    """Return a message with media, each a kind and a URL, before its text."""
    parts = [PARTS[route](url, kind) for kind, url in media_links]
    return {"role": role, "content": [*parts, {"type": TEXT[route], "text": text}]}


def ask(api: httpx.Client, route: str, turns: list[Part], stream: bool = False) -> str:
    """Return the text of the answer."""
    body: Part = {"model": MODEL, "stream": stream}
    body |= (
        {"input": turns, "max_output_tokens": 40} if route == "/v1/responses" else {"messages": turns, "max_tokens": 40}
    )
    answer = api.post(route, json=body)
    assert answer.status_code == 200, answer.text
    return "".join(streamed(route, answer.text)) if stream else text_of(route, answer.json())


def text_of(route: str, body: Part) -> str:
    match route:
        case "/v1/chat/completions":
            return str(body["choices"][0]["message"]["content"])
        case "/v1/responses":
            return str(body["output"][-1]["content"][0]["text"])
        case _:
            return str(body["content"][-1]["text"])


def streamed(route: str, text: str) -> Iterator[str]:
    for line in text.splitlines():
        if not line.startswith("data: {"):
            continue
        event = json.loads(line.removeprefix("data: "))
        match route:
            case "/v1/chat/completions":
                yield from (choice["delta"].get("content") or "" for choice in event["choices"])
            case "/v1/responses":
                yield event["delta"] if event["type"] == "response.output_text.delta" else ""
            case _:
                yield event.get("delta", {}).get("text", "")


routes = pytest.mark.parametrize("route", PARTS)
both_ways = pytest.mark.parametrize(
    "stream", [pytest.param(False, id="not streaming"), pytest.param(True, id="streaming")]
)


@both_ways
@routes
def test_an_image_in_base64_and_by_link(api: httpx.Client, links: Server, route: str, stream: bool) -> None:
    for url in (image_url("green"), f"{links.url}/picture/green"):
        assert ask(api, route, [turn(route, "What is this?", ("image", url))], stream) == "The image is green."


@both_ways
@routes
def test_several_images_in_order(api: httpx.Client, route: str, stream: bool) -> None:
    for colours in (("red", "blue"), ("blue", "red")):
        images = [("image", image_url(colour)) for colour in colours]
        text = ask(api, route, [turn(route, "What are these?", *images)], stream)
        assert text == f"The images are {colours[0]} and {colours[1]}."


@both_ways
def test_a_video_in_every_format_and_by_link(api: httpx.Client, links: Server, stream: bool) -> None:
    animation = media.data_url(media.animation("red", "blue"), "image/gif")
    for url in (FILM, animation, media.frames("red", "blue", 8), f"{links.url}/film/red-blue"):
        text = ask(api, CHAT, [turn(CHAT, "What happens?", ("video", url))], stream)
        assert text == "The video goes from red to blue."


@both_ways
def test_an_image_and_a_video_in_one_message(api: httpx.Client, stream: bool) -> None:
    text = ask(api, CHAT, [turn(CHAT, "What do you see?", ("image", image_url("green")), ("video", FILM))], stream)
    assert text == "The image is green. The video goes from red to blue."


@both_ways
@routes
def test_images_in_several_turns(api: httpx.Client, route: str, stream: bool) -> None:
    turns = [
        turn(route, "What is this?", ("image", image_url("pink"))),
        {"role": "assistant", "content": "The image is pink."},
        turn(route, "And this?", ("image", image_url("black"))),
    ]
    assert ask(api, route, turns, stream) == "The image is black."


def test_an_image_in_the_system_message(api: httpx.Client) -> None:
    system = turn(CHAT, "Look at it.", ("image", image_url("yellow")), role="system")
    body = {"model": MODEL, "messages": [system, {"role": "user", "content": "What is this?"}], "max_tokens": 40}
    tokens_with_image = api.post(CHAT, json=body).json()["usage"]["prompt_tokens"]
    system["content"].pop(0)
    assert tokens_with_image > api.post(CHAT, json=body).json()["usage"]["prompt_tokens"]


def test_an_image_on_the_workers_own_disk(http_worker: HttpWorker) -> None:
    file = http_worker.log.parent / "picture.webp"
    file.write_bytes(media.picture("cyan", kind="WEBP"))
    message = turn(CHAT, "What is this?", ("image", f"file://{file}"))
    with http_worker.client() as client:
        assert ask(client, CHAT, [message]) == "The image is cyan."


# ---- The caches


def metrics(http_worker: HttpWorker) -> dict[str, float]:
    with http_worker.client() as client:
        families = text_string_to_metric_families(client.get("/metrics").text)
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_a_repeated_image_comes_from_the_caches(http_worker: HttpWorker) -> None:
    """The prefix cache only holds full blocks of tokens, so the question is long."""
    picture = media.data_url(media.picture("purple", (333, 222)), "image/png")
    messages = [turn(CHAT, "What is this? " * 100, ("image", picture))]
    with http_worker.client() as client:
        ask(client, CHAT, messages)
        before = metrics(http_worker)
        ask(client, CHAT, messages)
    after = metrics(http_worker)
    for name in ("vllm:mm_cache_hits_total", "vllm:prefix_cache_hits_total"):
        assert after[name] > before[name]


def test_the_caches_never_confuse_images_of_the_same_size(api: httpx.Client) -> None:
    colours = list(itertools.islice(itertools.cycle(COLOURS), 64))

    def ask_about(colour: str) -> str:
        return ask(api, CHAT, [turn(CHAT, "What is this?", ("image", image_url(colour)))], stream=True)

    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(ask_about, colours)) == [f"The image is {colour}." for colour in colours]


# ---- Rejected media


def error_of(api: httpx.Client, route: str, turns: list[Part]) -> tuple[int, Part]:
    """Return the status and OpenAI's error object. Jobs use `/runsync`, because the proxy returns neither of them."""
    body = {"model": MODEL, **({"input": turns} if route == "/v1/responses" else {"messages": turns, "max_tokens": 4})}
    if "/openai" not in str(api.base_url):
        answer = api.post(route, json=body)
        return answer.status_code, answer.json()["error"]
    job = {"input": {"openai_route": route, "openai_input": body}}
    result = api.post(str(api.base_url).replace("/openai/", "/runsync"), json=job).json()
    assert result["status"] == "FAILED", result
    error = json.loads(result["error"])
    return error["code"], error


@pytest.mark.parametrize(
    ("path", "status"),
    [
        pytest.param("status/404", 422, id="not found"),
        pytest.param("status/500", 424, id="broken server"),
        pytest.param("redirect/http://u:p@example.org/", 403, id="redirect"),
        pytest.param("endless/", 413, id="endless"),
        pytest.param("hello", 400, id="not an image"),
    ],
)
@routes
def test_a_link_without_an_image_is_rejected(
    api: httpx.Client, links: Server, route: str, path: str, status: int
) -> None:
    images = ("image", image_url("red")), ("image", f"{links.url}/{path}?secret=xylophone")
    code, error = error_of(api, route, [turn(route, "What is this?", *images)])
    assert code == status
    assert error["message"].startswith(("messages[0].content[1], an image: ", "input[0].content[1], an image: "))
    assert "xylophone" not in error["message"]


def test_the_log_contains_no_rejected_link(http_worker: HttpWorker, links: Server) -> None:
    with http_worker.client() as client:
        for route in PARTS:
            error_of(client, route, [turn(route, "?", ("image", f"{links.url}/status/404?secret=xylophone"))])
    log = http_worker.log.read_text()
    assert "xylophone" not in log
    assert "Traceback" not in log


def test_a_link_to_a_slow_server_is_rejected(http_worker: HttpWorker, links: Server) -> None:
    with http_worker.client() as client:
        code, error = error_of(client, CHAT, [turn(CHAT, "?", ("image", f"{links.url}/drip/"))])
    assert (code, error["param"]) == (504, "messages[0].content[0]")
    assert "MEDIA_FETCH_TIMEOUT=2 s" in error["message"]


def test_too_many_images_are_rejected(api: httpx.Client) -> None:
    code, error = error_of(api, CHAT, [turn(CHAT, "?", *[("image", image_url("red"))] * 6)])
    assert (code, error["param"]) == (400, "messages[0].content[5]")
    assert "at most 5" in error["message"]
    assert "IMAGE_LIMIT" in error["message"]


def peak(process: psutil.Process) -> int:
    """Return the peak memory of a process since `reset_peak`, in bytes."""
    (line,) = (line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "VmHWM" in line)
    return 1024 * int(line.split()[1])


def reset_peak(process: psutil.Process) -> None:
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def test_hostile_files_are_rejected_with_little_memory(http_worker: HttpWorker, links: Server) -> None:
    """Each file causes an error, memory grows by less than 300 MB, and the worker continues."""
    worker = psutil.Process(http_worker.worker.pid)
    files = [("image", data) for _, data in hostile.images()] + [("video", data) for _, data in hostile.videos()]
    urls = [(kind, f"data:;base64,{base64.b64encode(data).decode()}") for kind, data in files]
    urls += [("video", f"data:video/jpeg;base64,{text}") for _, text in hostile.frames()]
    urls += [(kind, f"{links.url}/endless/") for kind in ("image", "video")]
    with http_worker.client() as client:
        assert ask(client, CHAT, [turn(CHAT, "?", ("image", image_url("red")))])
        before = worker.memory_info().rss
        reset_peak(worker)
        for kind, url in urls:
            code, error = error_of(client, CHAT, [turn(CHAT, "?", (kind, url))])
            assert code in (400, 413), (kind, url[:200], error)
            assert error["param"] == "messages[0].content[0]"
        assert ask(client, CHAT, [turn(CHAT, "What is this?", ("image", image_url("red")))]) == "The image is red."
    decoders = [
        child
        for child in worker.children()
        if "worker.media.decoder" in child.cmdline() and "cv2" in child.cmdline()[-1]
    ]
    assert peak(worker) - before + sum(map(peak, decoders)) < 300e6
    assert len(urls) > 60
    assert API_KEY not in http_worker.log.read_text()
