"""The playground: its HTTP response and, where Chromium is installed, its behaviour in the browser."""

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
from collections.abc import Callable, Iterator
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
from tests.http.serving import CHAT, EVENT_STREAM, serving
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


# ---- The HTTP response


def policy_of(headers: Any) -> dict[str, list[str]]:
    """Return the sources of each directive of the Content-Security-Policy."""
    directives = (directive.split() for directive in headers["content-security-policy"].split(";"))
    return {name: sources for name, *sources in directives}


class InlineCode(HTMLParser):
    """The texts of a page's script and style elements, and the attributes of all elements."""

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


def test_the_policy_allows_only_the_pages_own_script_and_style() -> None:
    body, headers = page("v1")
    policy, inline = policy_of(headers), InlineCode(body.decode())
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
    # The policy blocks inline styles and event handlers.
    assert not [name for name in inline.attributes if name == "style" or name.startswith("on")]


def test_the_page_has_headers_for_privacy_and_against_caching() -> None:
    _, headers = page("v1")
    assert headers.items() >= {
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        ("cache-control", "no-store"),
    }


def test_the_page_links_to_no_other_site_and_parses_no_text_as_html_or_code() -> None:
    text = PAGE.read_text()
    assert "://" not in text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text)


def test_the_page_holds_the_escaped_path_of_the_api() -> None:
    body, _ = page('v1"><script>')
    assert b'data-api="v1&quot;&gt;&lt;script&gt;"' in body
    assert b"{{" not in body


def test_the_playground_is_off_by_default() -> None:
    assert not read({}).playground
    with serving() as worker:
        response = worker.get("/")
        assert (response.status_code, response.json()["error"]["message"][:13]) == (404, "No route '/'.")


@pytest.mark.parametrize("ready", [pytest.param(True, id="ready"), pytest.param(False, id="loading")])
def test_the_playground_needs_the_setting_but_no_key(ready: bool) -> None:
    with serving(ready=ready, playground="true", worker_api_key="key") as worker:
        response = worker.get("/")
        assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")
        body, headers = page("v1")
        assert response.content == body
        assert response.headers.items() >= headers.items()
        assert worker.get("/v1/models").status_code == 401
        key = {"authorization": "Bearer key"}
        assert worker.get("/v1/models", headers=key).status_code == (200 if ready else 503)
        assert worker.post("/", headers=key).status_code == 404


def test_a_queue_worker_has_no_playground() -> None:
    with serving(worker_mode="queue", playground="true") as worker:
        assert worker.get("/").status_code == 404


def test_the_stand_in_serves_the_playground() -> None:
    with StandinServer(Platform(Behaviour(api_key="key"))) as server:
        response = httpx.get(f"{server.url}/")
        assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert b'data-api="v2/local/openai/v1"' in response.content
        assert policy_of(response.headers)["default-src"] == ["'none'"]
        assert httpx.post(f"{server.url}/").status_code == 405
        assert httpx.get(f"{server.url}/index.html").status_code == 404
        assert httpx.get(f"{server.endpoint_url}//").status_code == 404


# ---- In the browser


class Browser:
    """A browser that shows the playground. Elements are found by CSS selectors."""

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

    def send(self, text: str) -> None:
        self.find("#message").send_keys(text, Keys.ENTER)

    def drop(self, data: bytes, media_type: str) -> None:
        self.driver.execute_script(DROP, list(data), media_type)

    def wait_for_status(self, text: str) -> None:
        self.wait_until(lambda: text in self.text("#status"))

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait 30 s for the condition, or fail with the page's text."""
        WebDriverWait(self.driver, 30, 0.05).until(lambda _: condition(), self.find("body").text)

    def last_answer(self) -> str:
        """Return the model's last answer, once it is complete."""
        self.wait_for_status("Ready.")
        return str(self.all("article.model > .text")[-1].get_property("textContent"))

    def tab_order(self, count: int) -> list[str]:
        """Return the ids, or else the texts, of the first elements that Tab reaches from the top of the page."""
        self.driver.execute_script("const h1 = document.querySelector('h1'); h1.tabIndex = -1; h1.focus()")
        reached = []
        for _ in range(count):
            ActionChains(self.driver).send_keys(Keys.TAB).perform()
            focused = self.driver.switch_to.active_element
            reached.append(focused.get_attribute("id") or focused.text)
            shown = self.find(".button") if reached[-1] == "file" else focused
            assert shown.value_of_css_property("outline-style") == "solid", (
                f"The focus on {reached[-1]} is not visible."
            )
        return reached

    def colours(self, scheme: str) -> tuple[str, str]:
        """Return the colours of the background and of the text in the light or the dark scheme."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        root = self.find("html")
        return root.value_of_css_property("background-color"), root.value_of_css_property("color")

    def errors(self) -> list[str]:
        """Return the browser's error messages, also those about violations of the policy."""
        log: list[dict[str, str]] = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [line["message"] for line in log]

    def requested_urls(self) -> list[str]:
        """Return the URLs that the page has requested."""
        script = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
        return list(self.driver.execute_script(script))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}", "--window-size=1200,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options, Service(executable_path=DRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@needs_browser
def test_a_chat_with_text_an_image_and_a_video(endpoint: Endpoint, browser: Browser, tmp_path: Path) -> None:
    browser.open(f"{endpoint.server.url}/")
    browser.wait_for_status("Ready.")
    assert browser.text("#model") == "tiny"
    assert not browser.find("#request").is_displayed()

    browser.send("Hello")
    assert browser.last_answer() == "Hello! How can I help you?"
    assert "tokens in" in browser.text("article.model .note")
    # The Python code that the page shows runs.
    run = [sys.executable, "-c", browser.text("#python")]
    assert subprocess.run(run, capture_output=True, check=True, text=True).stdout == "Hello! How can I help you?"

    red, film_ = tmp_path / "red.png", tmp_path / "film.mp4"
    red.write_bytes(picture("red"))
    film_.write_bytes(film("red", "blue"))
    browser.find("#file").send_keys(str(red))
    browser.wait_until(lambda: browser.all("#attached img"))
    browser.send("What colour is this?")
    assert browser.last_answer() == "The image is red."
    assert browser.find("article.user img").get_attribute("alt") == "red.png"
    assert browser.find("article.user img").get_property("naturalWidth") == 64

    browser.find("#request summary").click()
    browser.wait_until(browser.find("#curl").is_displayed)
    for url, body in (parse_curl(browser.find("#curl").text), parse_python(browser.find("#python").text)):
        assert url.removesuffix("/chat/completions") == endpoint.server.openai_base_url
        assert (body["model"], body["stream"], body["stream_options"]) == ("tiny", True, {"include_usage": True})
        check_messages(body["messages"])

    browser.find("#new").click()
    assert not browser.all("article")
    browser.find("#file").send_keys(str(film_))
    browser.wait_until(lambda: browser.all("#attached video"))
    browser.send("What happens in the video?")
    assert browser.last_answer() == "The video goes from red to blue."
    assert browser.errors() == []
    assert all(url.startswith(f"{endpoint.server.url}/v2/local/openai/v1/") for url in browser.requested_urls())


def parse_curl(text: str) -> tuple[str, dict[str, Any]]:
    """Return the URL and the body of the request that a curl command sends."""
    command = shlex.split(text)
    assert command[:2] == ["curl", "-N"]
    return command[2], json.loads(command[command.index("-d") + 1])


def parse_python(text: str) -> tuple[str, dict[str, Any]]:
    """Return the base URL and the body of the request that a Python script sends with the `openai` package."""
    _, client, stream, *_ = (node for node in ast.parse(text).body if not isinstance(node, ast.Import))
    options, body = [{word.arg: word.value for word in node.value.keywords} for node in (client, stream)]  # type: ignore[attr-defined]
    return ast.literal_eval(options["base_url"]), {name: ast.literal_eval(value) for name, value in body.items()}


def check_messages(messages: list[dict[str, Any]]) -> None:
    """Check that the code shows the whole conversation, with the image's data shortened."""
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    image, text = messages[2]["content"]
    assert text == {"type": "text", "text": "What colour is this?"}
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert len(image["image_url"]["url"]) < 50
    assert image["image_url"]["url"].endswith("…")


HTML = "ä <img src=x onerror=alert(1)>\u2028true"
"""Text with a Unicode line separator, which some parsers take for a line break."""


class ScriptedEngine:
    """Has two models. The last message of a request selects the response, such as "refuse"."""

    def __init__(self) -> None:
        self.disconnected = threading.Event()
        self.requests: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        if scope["path"] == "/v1/models":
            await send_json(send, 200, {"data": [{"id": "one"}, {"id": "two"}]})
        elif scope["path"] == "/v1/audio/transcriptions":
            self.requests.append(json.loads(body))
            await send_json(send, 200, {"text": HTML})
        else:
            await self._answer(json.loads(body), receive, send)

    async def _answer(self, body: dict[str, Any], receive: Receive, send: Send) -> None:
        self.requests.append(body)
        script = body["messages"][-1]["content"]
        if script == "refuse":
            await send_json(send, 400, {"error": {"message": "<b>No</b>", "type": "BadRequestError"}})
            return
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
        await send_event(send, {"choices": [{"delta": {"reasoning": "Hm. "}}]})
        await send_event(send, {"choices": [{"delta": {"content": HTML}}]})
        if script == "break":
            await send_event(send, {"error": {"message": "The engine has died.", "code": 500}})
        if script == "endless":
            while (await receive())["type"] != "http.disconnect":
                pass
            self.disconnected.set()
        await send({"type": "http.response.body", "body": b"" if script == "end" else b"data: [DONE]\n\n"})


async def send_json(send: Send, status: int, value: Any) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(value).encode()})


async def send_event(send: Send, event: Any) -> None:
    """Send an event in three parts, split inside a character and before the last line end."""
    data = f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
    cut = data.find("ä".encode()) + 1
    for part in (data[:cut], data[cut:-1], data[-1:]):
        await send({"type": "http.response.body", "body": part, "more_body": True})
        await asyncio.sleep(0.01)


@needs_browser
def test_the_api_key_settings_errors_and_the_stop_button_work(browser: Browser) -> None:
    engine = ScriptedEngine()
    with serving(engine, playground=True, worker_api_key="key", ready=False) as worker:
        browser.open(f"{worker.url}/")
        browser.wait_for_status("Error 401: The API key is missing or wrong.")
        assert browser.find("#key").is_displayed()
        browser.find("#key").send_keys("key", Keys.TAB)
        browser.wait_for_status("Error 503: The worker is loading its model.")
        worker.become_ready()
        browser.send("Hi")
        browser.wait_for_status("Ready.")
        assert [option.text for option in browser.all("#model option")] == ["one", "two"]

        browser.find("#temperature").send_keys("0.5")
        browser.find("#tokens").send_keys("7")
        browser.find("#message").clear()
        browser.find("#message").send_keys("It's", Keys.SHIFT, Keys.ENTER)
        browser.send("true")
        # The page shows the model's answer as text, never as HTML.
        assert browser.last_answer() == HTML
        assert browser.text("article.model details p") == "Hm. "
        assert (engine.requests[-1]["temperature"], engine.requests[-1]["max_tokens"]) == (0.5, 7)
        assert engine.requests[-1]["messages"] == [{"role": "user", "content": "It's\ntrue"}]
        curl, python = browser.text("#curl"), browser.text("#python")
        assert parse_curl(curl) == (f"{worker.url}{CHAT}", engine.requests[-1])
        assert parse_python(python) == (f"{worker.url}/v1", engine.requests[-1])
        assert '-H "Authorization: Bearer $API_KEY"' in curl
        assert 'os.environ["API_KEY"]' in python

        for script, message in (
            ("refuse", "Error 400: <b>No</b>"),
            ("break", "Error 500: The engine has died."),
            ("end", "The connection ended before the answer did."),
        ):
            browser.send(script)
            browser.wait_for_status("Ready.")
            assert browser.all("article.model:last-child .wrong")[-1].text == message
            # The message can be corrected and sent again, and is not part of the next request.
            assert browser.find("#message").get_property("value") == script
            assert len(engine.requests[-1]["messages"]) == 3
            browser.find("#message").clear()

        browser.send("endless")
        browser.wait_until(
            lambda: browser.find("#stop").is_displayed() and "onerror" in browser.all("article")[-1].text
        )
        browser.find("#stop").click()
        assert engine.disconnected.wait(timeout=10)
        browser.wait_for_status("Ready.")
        assert "Stopped" in browser.text("article:last-child .note")
        assert not browser.find("#stop").is_displayed()


@needs_browser
def test_a_pdf_and_a_sound_can_be_dropped(browser: Browser) -> None:
    engine = ScriptedEngine()
    with serving(engine, playground=True) as worker:
        browser.open(f"{worker.url}/")
        browser.wait_for_status("Ready.")
        browser.drop(b"%PDF-", "application/pdf")
        browser.wait_until(lambda: browser.all("#attached figure"))
        assert not browser.find("#transcribe").is_displayed()
        browser.send("Sum up")
        assert browser.last_answer() == HTML
        url = "data:application/pdf;base64,JVBERi0="
        file = {"type": "file", "file": {"filename": "dropped", "file_data": url}}
        assert engine.requests[-1]["messages"][0]["content"] == [file, {"type": "text", "text": "Sum up"}]

        browser.drop(b"RIFF", "audio/wav")
        browser.wait_until(lambda: browser.all("#attached audio"))
        browser.send("Answer")
        assert browser.last_answer() == HTML
        sound = {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,UklGRg=="}}
        assert engine.requests[-1]["messages"][-1]["content"][0] == sound

        browser.drop(b"RIFF", "audio/wav")
        browser.wait_until(browser.find("#transcribe").is_displayed)
        browser.find("#message").send_keys("kept")
        browser.find("#transcribe").click()
        browser.wait_until(lambda: len(browser.all("article.model")) == 3)
        assert browser.last_answer() == HTML
        assert browser.find("#message").get_property("value") == "kept"
        assert engine.requests[-1] == {"model": "one", "file": "data:audio/wav;base64,UklGRg=="}
        url, body = parse_curl(browser.text("#curl"))
        assert (url, body["model"]) == (f"{worker.url}/v1/audio/transcriptions", "one")
        python = browser.text("#python")
        ast.parse(python)
        assert 'client.audio.transcriptions.create(model="one", file=sound)' in python
        assert not [error for error in browser.errors() if "Content Security Policy" in error]


@needs_browser
def test_the_page_is_accessible_responsive_and_has_a_dark_scheme(browser: Browser, tmp_path: Path) -> None:
    with serving(ScriptedEngine(), playground=True) as worker:
        browser.open(f"{worker.url}/")
        browser.wait_for_status("Ready.")
        browser.find("#settings summary").click()
        (tmp_path / "red.png").write_bytes(picture("red"))
        browser.find("#file").send_keys(str(tmp_path / "red.png"))
        browser.wait_until(lambda: browser.all("#attached img"))
        order = ["new", "Settings", "model", "key", "temperature", "tokens", "Remove", "message", "file", "send"]
        assert browser.tab_order(len(order)) == order
        names = [
            field.accessible_name for field in browser.all("button, input, select, textarea") if field.is_displayed()
        ]
        assert names == [
            "New chat",
            "Model",
            "API key",
            "Temperature",
            "Tokens at most",
            "Remove red.png",
            "Message (Enter sends it, Shift and Enter makes a new line)",
            "Add a file",
            "Send",
        ]
        browser.find("#attached button").click()
        assert not browser.all("#attached img")
        browser.drop(picture("red"), "image/png")
        browser.wait_until(lambda: browser.all("#attached img"))
        browser.drop(b"Once", "text/plain")
        browser.wait_for_status("dropped is no image, video, sound or PDF.")
        assert (browser.find("#log").aria_role, browser.find("#log").get_attribute("aria-live")) == ("log", "polite")

        light, dark = browser.colours("light"), browser.colours("dark")
        assert light[0] != dark[0]
        assert light[1] != dark[1]

        narrow = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
        browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
        root = browser.find("html")
        assert root.get_property("scrollWidth") == root.get_property("clientWidth") == 360
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
