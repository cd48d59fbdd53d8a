"""Images and videos through every route of the real engine, from the queue and over HTTP, streaming and not.

The embedded model names what it sees, in order.
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

from tests.conftest import API_KEY, Endpoint, HttpWorker
from tests.support import hostile, media
from tests.support.links import Server
from tests.support.media import COLOURS, image_url

MODEL = "tiny"
CHAT = "/v1/chat/completions"
Part = dict[str, Any]

FILM = media.data_url(media.film("red", "blue"), "video/mp4")


@pytest.fixture(scope="module", params=["queue", "http"])
def api(request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    """A client of the worker's routes, whichever way they are reached."""
    if request.param == "queue":
        endpoint: Endpoint = request.getfixturevalue("endpoint")
        # The platform's proxy has routes below /v1 alone.
        with httpx.Client(base_url=f"{endpoint.url}/openai", timeout=60) as client:
            yield client
    else:
        worker: HttpWorker = request.getfixturevalue("http_worker")
        with worker.client() as client:
            yield client


# ---- Three dialects for the same message


def chat_part(url: str, kind: str) -> Part:
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def responses_part(url: str, kind: str) -> Part:
    assert kind == "image", "neither OpenAI nor vLLM knows videos here"
    return {"type": "input_image", "image_url": url}


def messages_part(url: str, kind: str) -> Part:
    assert kind == "image", "neither Anthropic nor vLLM knows videos here"
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


def turn(route: str, text: str, *shown: tuple[str, str], role: str = "user") -> Part:
    """Return a message with the media before its text."""
    parts = [PARTS[route](url, kind) for kind, url in shown]
    return {"role": role, "content": [*parts, {"type": TEXT[route], "text": text}]}


def ask(api: httpx.Client, route: str, turns: list[Part], stream: bool = False) -> str:
    """Return what the model says."""
    body: Part = {"model": MODEL, "stream": stream}
    body |= (
        {"input": turns, "max_output_tokens": 40} if route == "/v1/responses" else {"messages": turns, "max_tokens": 40}
    )
    answer = api.post(route, json=body)
    assert answer.status_code == 200, answer.text
    return "".join(streamed(route, answer.text)) if stream else whole(route, answer.json())


def whole(route: str, body: Part) -> str:
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
        shown = [("image", image_url(colour)) for colour in colours]
        said = ask(api, route, [turn(route, "What are these?", *shown)], stream)
        assert said == f"The images are {colours[0]} and {colours[1]}."


@both_ways
def test_a_video_of_any_sort(api: httpx.Client, links: Server, stream: bool) -> None:
    animation = media.data_url(media.animation("red", "blue"), "image/gif")
    for url in (FILM, animation, media.frames("red", "blue", 8), f"{links.url}/film/red-blue"):
        assert (
            ask(api, CHAT, [turn(CHAT, "What happens?", ("video", url))], stream) == "The video goes from red to blue."
        )


@both_ways
def test_an_image_and_a_video_in_one_message(api: httpx.Client, stream: bool) -> None:
    said = ask(api, CHAT, [turn(CHAT, "What do you see?", ("image", image_url("green")), ("video", FILM))], stream)
    assert said == "The image is green. The video goes from red to blue."


@both_ways
@routes
def test_several_turns(api: httpx.Client, route: str, stream: bool) -> None:
    turns = [
        turn(route, "What is this?", ("image", image_url("pink"))),
        {"role": "assistant", "content": "The image is pink."},
        turn(route, "And this?", ("image", image_url("black"))),
    ]
    assert ask(api, route, turns, stream) == "The image is black."


def test_an_image_in_the_system_message(api: httpx.Client) -> None:
    system = turn(CHAT, "Look at it.", ("image", image_url("yellow")), role="system")
    body = {"model": MODEL, "messages": [system, {"role": "user", "content": "What is this?"}], "max_tokens": 40}
    whole = api.post(CHAT, json=body).json()["usage"]["prompt_tokens"]
    system["content"].pop(0)
    assert whole > api.post(CHAT, json=body).json()["usage"]["prompt_tokens"]


def test_an_image_on_the_workers_own_disk(http_worker: HttpWorker) -> None:
    file = http_worker.log.parent / "picture.webp"
    file.write_bytes(media.picture("cyan", kind="WEBP"))
    shown = turn(CHAT, "What is this?", ("image", f"file://{file}"))
    with http_worker.client() as client:
        assert ask(client, CHAT, [shown]) == "The image is cyan."


# ---- The caches


def counters(http_worker: HttpWorker) -> dict[str, float]:
    with http_worker.client() as client:
        families = text_string_to_metric_families(client.get("/metrics").text)
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_an_image_that_has_been_seen_is_not_worked_on_again(http_worker: HttpWorker) -> None:
    """The prefix cache keeps whole blocks, so the question is long."""
    picture = media.data_url(media.picture("purple", (333, 222)), "image/png")
    shown = [turn(CHAT, "What is this? " * 100, ("image", picture))]
    with http_worker.client() as client:
        ask(client, CHAT, shown)
        before = counters(http_worker)
        ask(client, CHAT, shown)
    after = counters(http_worker)
    for name in ("vllm:mm_cache_hits_total", "vllm:prefix_cache_hits_total"):
        assert after[name] > before[name]


def test_images_of_one_size_are_never_taken_for_each_other(api: httpx.Client) -> None:
    colours = list(itertools.islice(itertools.cycle(COLOURS), 64))

    def one(colour: str) -> str:
        return ask(api, CHAT, [turn(CHAT, "What is this?", ("image", image_url(colour)))], stream=True)

    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(one, colours)) == [f"The image is {colour}." for colour in colours]


# ---- What is refused


def refused(api: httpx.Client, route: str, turns: list[Part]) -> tuple[int, Part]:
    """Return the status and OpenAI's error object; the proxy tells neither of a job that failed, `/runsync` does."""
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
        pytest.param("hello", 400, id="no image"),
    ],
)
@routes
def test_a_link_that_leads_to_nothing(api: httpx.Client, links: Server, route: str, path: str, status: int) -> None:
    shown = turn(route, "What is this?", ("image", image_url("red")), ("image", f"{links.url}/{path}?secret=xylophone"))
    code, error = refused(api, route, [shown])
    assert code == status
    assert error["message"].startswith(("messages[0].content[1], an image: ", "input[0].content[1], an image: "))
    assert "xylophone" not in error["message"]


def test_what_is_refused_leaves_no_trace_in_the_log(http_worker: HttpWorker, links: Server) -> None:
    with http_worker.client() as client:
        for route in PARTS:
            refused(client, route, [turn(route, "?", ("image", f"{links.url}/status/404?secret=xylophone"))])
    log = http_worker.log.read_text()
    assert "xylophone" not in log
    assert "Traceback" not in log


def test_a_server_that_is_too_slow(http_worker: HttpWorker, links: Server) -> None:
    with http_worker.client() as client:
        shown = turn(CHAT, "?", ("image", f"{links.url}/drip/"))
        code, error = refused(client, CHAT, [shown])
    assert (code, error["param"]) == (504, "messages[0].content[0]")
    assert "MEDIA_FETCH_TIMEOUT=2 s" in error["message"]


def test_too_many_images(api: httpx.Client) -> None:
    shown = [turn(CHAT, "?", *[("image", image_url("red"))] * 5)]
    code, error = refused(api, CHAT, shown)
    assert (code, error["param"]) == (400, "messages[0].content[4]")
    assert "at most 4" in error["message"]
    assert "IMAGE_LIMIT" in error["message"]


def peak(process: psutil.Process) -> int:
    """Return the most memory that a process has had since `forget_peak`, in bytes."""
    (line,) = (line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "VmHWM" in line)
    return 1024 * int(line.split()[1])


def forget_peak(process: psutil.Process) -> None:
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def test_hostile_files_cost_little_and_the_worker_stays_up(http_worker: HttpWorker, links: Server) -> None:
    """Each of them gives an error, and memory stays within 300 MB of what it was."""
    worker = psutil.Process(http_worker.worker.pid)
    files = [("image", data) for _, data in hostile.images()] + [("video", data) for _, data in hostile.videos()]
    urls = [(kind, f"data:;base64,{base64.b64encode(data).decode()}") for kind, data in files]
    urls += [("video", f"data:video/jpeg;base64,{text}") for _, text in hostile.frames()]
    urls += [(kind, f"{links.url}/endless/") for kind in ("image", "video")]
    with http_worker.client() as client:
        assert ask(client, CHAT, [turn(CHAT, "?", ("image", image_url("red")))])
        before = worker.memory_info().rss
        forget_peak(worker)
        for kind, url in urls:
            code, error = refused(client, CHAT, [turn(CHAT, "?", (kind, url))])
            assert code in (400, 413), (kind, url[:200], error)
            assert error["param"] == "messages[0].content[0]"
        assert ask(client, CHAT, [turn(CHAT, "What is this?", ("image", image_url("red")))]) == "The image is red."
    decoders = [one for one in worker.children() if "worker.media.decoder" in one.cmdline()]
    assert peak(worker) - before + sum(map(peak, decoders)) < 300e6
    assert len(urls) > 60
    assert API_KEY not in http_worker.log.read_text()
