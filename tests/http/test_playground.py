"""The page to try the model: what it is sent with, and, where there is a Chromium, what a reader sees and does."""

import ast
import asyncio
import base64
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium.webdriver import ActionChains, Chrome, ChromeOptions, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from standin import Behaviour, Platform, StandinServer
from tests.conftest import Endpoint
from tests.http.test_gate import CHAT, serving
from tests.support.media import film, picture
from worker.http.playground import PAGE, page
from worker.request.asgi import Receive, Send
from worker.settings import read

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()

DROP = """
    const files = new DataTransfer();
    files.items.add(new File([new Uint8Array(arguments[0])], "dropped", {type: arguments[1]}));
    document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true}));
"""

needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="`make browser` installs Chromium")


# ---- What is sent


def policy_of(headers: Any) -> dict[str, list[str]]:
    """Return the sources of each directive."""
    directives = (one.split() for one in headers["content-security-policy"].split(";"))
    return {name: sources for name, *sources in directives}


class Inline(HTMLParser):
    """What stands between script and style tags, and every attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self.attributes: dict[str, str | None] = {}
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        self.attributes.update(attrs)

    def handle_data(self, data: str) -> None:
        if self._tag in self.texts:
            self.texts[self._tag].append(data)
            self._tag = ""


def test_only_what_the_page_holds_runs() -> None:
    body, headers = page("v1")
    policy, inline = policy_of(headers), Inline(body.decode())
    for tag, texts in inline.texts.items():
        hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts]
        assert len(hashes) == 1
        assert policy.pop(f"{tag}-src") == hashes
    assert policy == {
        "default-src": ["'none'"],
        "connect-src": ["'self'"],
        "img-src": ["data:", "blob:"],
        "media-src": ["data:", "blob:"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "frame-ancestors": ["'none'"],
    }
    # The policy would not let these run.
    assert not [name for name in inline.attributes if name == "style" or name.startswith("on")]


def test_the_other_headers() -> None:
    _, headers = page("v1")
    assert headers.items() >= {
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        ("cache-control", "no-store"),
    }


def test_the_page_leads_nowhere_else() -> None:
    text = PAGE.read_text()
    assert "://" not in text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text)


def test_the_way_to_the_api_is_filled_in() -> None:
    body, _ = page('v1"><script>')
    assert b'data-api="v1&quot;&gt;&lt;script&gt;"' in body
    assert b"{{" not in body


def test_off_by_default() -> None:
    assert not read({}).playground
    with serving() as worker:
        answer = worker.get("/")
        assert (answer.status_code, answer.json()["error"]["message"][:13]) == (404, "No route '/'.")


@pytest.mark.parametrize("ready", [pytest.param(True, id="ready"), pytest.param(False, id="loading")])
def test_on_by_setting_and_without_a_key(ready: bool) -> None:
    with serving(ready=ready, playground="true", worker_api_key="key") as worker:
        answer = worker.get("/")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
        body, headers = page("v1")
        assert answer.content == body
        assert answer.headers.items() >= headers.items()
        assert worker.get("/v1/models").status_code == 401
        key = {"authorization": "Bearer key"}
        assert worker.get("/v1/models", headers=key).status_code == (200 if ready else 503)
        assert worker.post("/", headers=key).status_code == 404


def test_a_worker_of_the_queue_has_no_page() -> None:
    with serving(worker_mode="queue", playground="true") as worker:
        assert worker.get("/").status_code == 404


def test_the_stand_in_has_the_page() -> None:
    with StandinServer(Platform(Behaviour(api_key="key"))) as server:
        answer = httpx.get(f"{server.url}/")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert b'data-api="v2/local/openai/v1"' in answer.content
        assert policy_of(answer.headers)["default-src"] == ["'none'"]
        assert httpx.post(f"{server.url}/").status_code == 405
        assert httpx.get(f"{server.url}/index.html").status_code == 404
        assert httpx.get(f"{server.endpoint_url}//").status_code == 404


# ---- What is seen and done


class Reader:
    """A reader of the page, with a browser."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get(url)
        self.driver.get_log("browser")  # type: ignore[no-untyped-call]

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return str(self.find(selector).get_property("textContent"))

    def ask(self, text: str) -> None:
        self.find("#message").send_keys(text, Keys.ENTER)

    def drop(self, data: bytes, media_type: str) -> None:
        self.driver.execute_script(DROP, list(data), media_type)

    def until_status(self, text: str) -> None:
        self.until(lambda: text in self.text("#status"))

    def until(self, holds: Any) -> None:
        WebDriverWait(self.driver, 30, 0.05).until(lambda _: holds(), self.find("body").text)

    def last_answer(self) -> str:
        """Return what the model has said last, once it is complete."""
        self.until_status("Ready.")
        return str(self.all("article.model > .text")[-1].get_property("textContent"))

    def tabbed(self, count: int) -> list[str]:
        """Return the ids, or else the texts, of what Tab reaches from the beginning of the page."""
        self.driver.execute_script("const h1 = document.querySelector('h1'); h1.tabIndex = -1; h1.focus()")
        reached = []
        for _ in range(count):
            ActionChains(self.driver).send_keys(Keys.TAB).perform()
            focused = self.driver.switch_to.active_element
            reached.append(focused.get_attribute("id") or focused.text)
            shown = self.find(".button") if reached[-1] == "file" else focused
            assert shown.value_of_css_property("outline-style") == "solid", f"no focus is seen on {reached[-1]}"
        return reached

    def colours(self, scheme: str) -> tuple[str, str]:
        """Return the colours of the page and of its text in the light or the dark scheme."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        root = self.find("html")
        return root.value_of_css_property("background-color"), root.value_of_css_property("color")

    def complaints(self) -> list[str]:
        """Return what the browser has complained of, refusals by the policy included."""
        log: list[dict[str, str]] = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [line["message"] for line in log]

    def fetched(self) -> list[str]:
        """Return the addresses of all that the page has asked for."""
        script = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
        return list(self.driver.execute_script(script))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}", "--window-size=1200,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options, Service(executable_path=DRIVER))
    try:
        yield Reader(driver)
    finally:
        driver.quit()


@needs_browser
def test_a_chat_with_the_model(endpoint: Endpoint, reader: Reader, tmp_path: Path) -> None:
    reader.open(f"{endpoint.server.url}/")
    reader.until_status("Ready.")
    assert reader.text("#model") == "tiny"
    assert not reader.find("#request").is_displayed()

    reader.ask("Hello")
    assert reader.last_answer() == "Hello! How can I help you?"
    assert "tokens in" in reader.text("article.model .note")
    # What is shown can be run.
    run = [sys.executable, "-c", reader.text("#python")]
    assert subprocess.run(run, capture_output=True, check=True, text=True).stdout == "Hello! How can I help you?"

    red, film_ = tmp_path / "red.png", tmp_path / "film.mp4"
    red.write_bytes(picture("red"))
    film_.write_bytes(film("red", "blue"))
    reader.find("#file").send_keys(str(red))
    reader.until(lambda: reader.all("#attached img"))
    reader.ask("What colour is this?")
    assert reader.last_answer() == "The image is red."
    assert reader.find("article.user img").get_attribute("alt") == "red.png"
    assert reader.find("article.user img").get_property("naturalWidth") == 64

    reader.find("#request summary").click()
    reader.until(reader.find("#curl").is_displayed)
    for address, body in (of_curl(reader.find("#curl").text), of_python(reader.find("#python").text)):
        assert address.removesuffix("/chat/completions") == endpoint.server.openai_base_url
        assert (body["model"], body["stream"], body["stream_options"]) == ("tiny", True, {"include_usage": True})
        check_messages(body["messages"])

    reader.find("#new").click()
    assert not reader.all("article")
    reader.find("#file").send_keys(str(film_))
    reader.until(lambda: reader.all("#attached video"))
    reader.ask("What happens in the video?")
    assert reader.last_answer() == "The video goes from red to blue."
    assert reader.complaints() == []
    assert all(address.startswith(f"{endpoint.server.url}/v2/local/openai/v1/") for address in reader.fetched())


def of_curl(text: str) -> tuple[str, dict[str, Any]]:
    """Return the address and the body of the request that a curl command makes."""
    command = shlex.split(text)
    assert command[:2] == ["curl", "-N"]
    return command[2], json.loads(command[command.index("-d") + 1])


def of_python(text: str) -> tuple[str, dict[str, Any]]:
    """Return the same of a script."""
    _, client, stream, *_ = (one for one in ast.parse(text).body if not isinstance(one, ast.Import))
    given = [{one.arg: one.value for one in node.value.keywords} for node in (client, stream)]  # type: ignore[attr-defined]
    return ast.literal_eval(given[0]["base_url"]), {name: ast.literal_eval(value) for name, value in given[1].items()}


def check_messages(messages: list[dict[str, Any]]) -> None:
    """The whole conversation, with the picture cut short."""
    assert [one["role"] for one in messages] == ["user", "assistant", "user"]
    image, text = messages[2]["content"]
    assert text == {"type": "text", "text": "What colour is this?"}
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert len(image["image_url"]["url"]) < 50
    assert image["image_url"]["url"].endswith("…")


HTML = "ä <img src=x onerror=alert(1)>\u2028true"
"""With what some take for a line break."""


class Scripted:
    """Has a model, and answers with what its last message asks for."""

    def __init__(self) -> None:
        self.left = threading.Event()
        self.asked: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        if scope["path"] == "/v1/models":
            await reply(send, 200, {"data": [{"id": "one"}, {"id": "two"}]})
        else:
            await self._answer(json.loads(body), receive, send)

    async def _answer(self, body: dict[str, Any], receive: Receive, send: Send) -> None:
        self.asked.append(body)
        script = body["messages"][-1]["content"]
        if script == "refuse":
            await reply(send, 400, {"error": {"message": "<b>No</b>", "type": "BadRequestError"}})
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await say(send, {"choices": [{"delta": {"reasoning": "Hm. "}}]})
        await say(send, {"choices": [{"delta": {"content": HTML}}]})
        if script == "break":
            await say(send, {"error": {"message": "The engine has died.", "code": 500}})
        if script == "go on":
            while (await receive())["type"] != "http.disconnect":
                pass
            self.left.set()
        await send({"type": "http.response.body", "body": b"" if script == "end" else b"data: [DONE]\n\n"})


async def reply(send: Send, status: int, value: Any) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(value).encode()})


async def say(send: Send, event: Any) -> None:
    """Send an event in parts, cut within a letter and within its end."""
    data = f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
    cut = data.find("ä".encode()) + 1
    for part in (data[:cut], data[cut:-1], data[-1:]):
        await send({"type": "http.response.body", "body": part, "more_body": True})
        await asyncio.sleep(0.01)


@needs_browser
def test_keys_errors_and_the_stop_button(reader: Reader) -> None:
    engine = Scripted()
    with serving(engine, playground=True, worker_api_key="key", ready=False) as worker:
        reader.open(f"{worker.url}/")
        reader.until_status("Error 401: The API key is missing or wrong.")
        assert reader.find("#key").is_displayed()
        reader.find("#key").send_keys("key", Keys.TAB)
        reader.until_status("Error 503: The worker is loading its model.")
        worker.ready()
        reader.ask("Hi")
        reader.until_status("Ready.")
        assert [one.text for one in reader.all("#model option")] == ["one", "two"]

        reader.find("#temperature").send_keys("0.5")
        reader.find("#tokens").send_keys("7")
        reader.find("#message").clear()
        reader.find("#message").send_keys("It's", Keys.SHIFT, Keys.ENTER)
        reader.ask("true")
        # What the model says is never HTML.
        assert reader.last_answer() == HTML
        assert reader.text("article.model details p") == "Hm. "
        assert (engine.asked[-1]["temperature"], engine.asked[-1]["max_tokens"]) == (0.5, 7)
        assert engine.asked[-1]["messages"] == [{"role": "user", "content": "It's\ntrue"}]
        curl, python = reader.text("#curl"), reader.text("#python")
        assert of_curl(curl) == (f"{worker.url}{CHAT}", engine.asked[-1])
        assert of_python(python) == (f"{worker.url}/v1", engine.asked[-1])
        assert '-H "Authorization: Bearer $API_KEY"' in curl
        assert 'os.environ["API_KEY"]' in python

        for script, told in (
            ("refuse", "Error 400: <b>No</b>"),
            ("break", "Error 500: The engine has died."),
            ("end", "The connection ended before the answer did."),
        ):
            reader.ask(script)
            reader.until_status("Ready.")
            assert reader.all("article.model:last-child .wrong")[-1].text == told
            # It can be mended and sent again, and is not in the way of what comes next.
            assert reader.find("#message").get_property("value") == script
            assert len(engine.asked[-1]["messages"]) == 3
            reader.find("#message").clear()

        reader.ask("go on")
        reader.until(lambda: reader.find("#stop").is_displayed() and "onerror" in reader.all("article")[-1].text)
        reader.find("#stop").click()
        assert engine.left.wait(timeout=10)
        reader.until_status("Ready.")
        assert "Stopped" in reader.text("article:last-child .note")
        assert not reader.find("#stop").is_displayed()


@needs_browser
def test_everybody_can_use_it(reader: Reader, tmp_path: Path) -> None:
    with serving(Scripted(), playground=True) as worker:
        reader.open(f"{worker.url}/")
        reader.until_status("Ready.")
        reader.find("#settings summary").click()
        (tmp_path / "red.png").write_bytes(picture("red"))
        reader.find("#file").send_keys(str(tmp_path / "red.png"))
        reader.until(lambda: reader.all("#attached img"))
        order = ["new", "Settings", "model", "key", "temperature", "tokens", "Remove", "message", "file", "send"]
        assert reader.tabbed(len(order)) == order
        names = [one.accessible_name for one in reader.all("button, input, select, textarea") if one.is_displayed()]
        assert names == [
            "New chat",
            "Model",
            "API key",
            "Temperature",
            "Tokens at most",
            "Remove red.png",
            "Message (Enter sends it, Shift and Enter makes a new line)",
            "Add image or video",
            "Send",
        ]
        reader.find("#attached button").click()
        assert not reader.all("#attached img")
        reader.drop(picture("red"), "image/png")
        reader.until(lambda: reader.all("#attached img"))
        reader.drop(b"Once", "text/plain")
        reader.until_status("dropped is neither an image nor a video.")
        assert (reader.find("#log").aria_role, reader.find("#log").get_attribute("aria-live")) == ("log", "polite")

        light, dark = reader.colours("light"), reader.colours("dark")
        assert light[0] != dark[0]
        assert light[1] != dark[1]

        narrow = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
        reader.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
        root = reader.find("html")
        assert root.get_property("scrollWidth") == root.get_property("clientWidth") == 360
        reader.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
