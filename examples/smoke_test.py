"""See whether a worker that was just deployed does what it should, in a minute.

    API_KEY=… python examples/smoke_test.py http://127.0.0.1:8000
    RUNPOD_API_KEY=… python examples/smoke_test.py https://api.runpod.ai/v2/ENDPOINT_ID

The first form is for a worker over HTTP, the second for an endpoint with a queue. Prints a table; the exit code is 1
when a check failed. What the model cannot see is skipped. Needs: pip install openai requests pillow
"""

import argparse
import base64
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import openai
import requests
from PIL import Image

NO_MODEL = "a-model-that-is-not-there"


class FailedError(Exception):
    """The worker answered, but not as it should."""


class SkippedError(Exception):
    """There is nothing to check; the text says why."""


class Worker:
    """The worker, by whichever way it is reached. Each check returns what it saw."""

    def __init__(self, base_url: str, image_url: str | None, timeout: float) -> None:
        self.url = base_url.rstrip("/")
        self.is_queue = re.search(r"/v2/[^/]+$", self.url) is not None
        key = os.environ.get("RUNPOD_API_KEY" if self.is_queue else "API_KEY", "none")
        self.image_url = image_url
        self.timeout = timeout
        self.http = requests.Session()
        self.http.headers["Authorization"] = f"Bearer {key}"
        base = f"{self.url}/openai/v1" if self.is_queue else f"{self.url}/v1"
        self.client = openai.OpenAI(base_url=base, api_key=key, timeout=timeout, max_retries=0)
        self.model = ""
        self.limits: dict[str, int | None] | None = None

    def health(self) -> str:
        """The worker answers and is ready."""
        status = self.ask_worker("/health")["status"]
        if status != "ready":
            raise FailedError(f"the worker is {status}")
        return str(status)

    def info(self) -> str:
        """It tells what it runs."""
        engine = self.ask_worker("/info")["engine"]
        self.model, self.limits = engine["served_names"][0], engine["media_limits"]
        return f"{self.model}, vLLM {engine['versions']['vllm']}, {engine['max_model_len']} tokens"

    def models(self) -> str:
        """It lists its model."""
        self.model = next(iter(self.client.models.list())).id
        return self.model

    def text(self) -> str:
        """It answers a question."""
        return self.ask([{"type": "text", "text": "Hello"}])

    def streaming(self) -> str:
        """It answers in parts, and tells how many tokens it took."""
        stream = self.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": "Tell me a story"}],
            max_tokens=100,
            stream=True,
            stream_options={"include_usage": True},
        )
        began, first, tokens, text = time.monotonic(), 0.0, 0, ""
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.monotonic() - began
                text += chunk.choices[0].delta.content
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        if not text or not tokens:
            raise FailedError(f"the stream had {len(text)} characters and {tokens} tokens")
        return f"{tokens} tokens, the first after {first:.2f} s"

    def image(self) -> str:
        """It sees a picture."""
        self.needs("image")
        return self.sees("red", "image", data_url("image/png", png("red")), "What colour is this?")

    def image_by_url(self) -> str:
        """It fetches a picture."""
        self.needs("image")
        if not self.image_url:
            raise SkippedError("no --image-url was given")
        return self.ask([part("image", self.image_url), {"type": "text", "text": "What is this?"}])

    def video(self) -> str:
        """It sees a film."""
        self.needs("video")
        return self.sees("blue", "video", data_url("video/gif", film("red", "blue")), "What happens in the video?")

    def errors(self) -> str:
        """It tells a mistake, and goes on."""
        body = {"model": NO_MODEL, "messages": [{"role": "user", "content": "Hello"}]}
        if self.is_queue:
            answer = self.run({"openai_route": "/v1/chat/completions", "openai_input": body})
            error = json.loads(answer.get("error", "{}"))
        else:
            error = self.http.post(f"{self.url}/v1/chat/completions", json=body, timeout=self.timeout).json()["error"]
        if error.get("code") != 404 or NO_MODEL not in error.get("message", ""):
            raise FailedError(f"a model that is not there is told as {error}")
        self.text()
        return str(error["message"])

    def needs(self, kind: str) -> None:
        """Skip the check where the model does not take such media."""
        if self.limits is not None and self.limits.get(kind, 0) == 0:
            raise SkippedError(f"the model takes no {kind}")

    def sees(self, colour: str, kind: str, url: str, text: str) -> str:
        """Ask about a picture or film and look for a colour in the answer."""
        answer = self.ask([part(kind, url), {"type": "text", "text": text}])
        if colour not in answer.lower():
            raise FailedError(f"no {colour} in the answer: {answer}")
        return answer

    def ask(self, parts: Any) -> str:
        """Return the model's answer."""
        answer = self.client.chat.completions.create(
            model=self.model, messages=[{"role": "user", "content": parts}], max_tokens=100
        )
        if not (text := answer.choices[0].message.content):
            raise FailedError(f"the answer is empty, and ended by {answer.choices[0].finish_reason}")
        return text

    def ask_worker(self, route: str) -> Any:
        """Return what the worker tells of itself; through the queue that is a job as any other."""
        if not self.is_queue:
            answer = self.http.get(self.url + route, timeout=self.timeout)
            answer.raise_for_status()
            return answer.json()
        answer = self.run({"route": route})
        if answer["status"] != "COMPLETED":
            raise FailedError(f"the job is {answer['status']}: {answer.get('error')}")
        return answer["output"][0]

    def run(self, job_input: dict[str, Any]) -> Any:
        """Return a job's end; a worker that has yet to start is waited for."""
        answer = self.http.post(f"{self.url}/runsync", json={"input": job_input}, timeout=self.timeout)
        answer.raise_for_status()
        body, end = answer.json(), time.monotonic() + self.timeout
        while body["status"] in ("IN_QUEUE", "IN_PROGRESS"):
            if time.monotonic() > end:
                raise FailedError(f"the job is {body['status']} after {self.timeout:.0f} s")
            time.sleep(1)
            answer = self.http.get(f"{self.url}/status/{body['id']}", timeout=self.timeout)
            answer.raise_for_status()
            body = answer.json()
        return body


def part(kind: str, url: str) -> dict[str, Any]:
    """Return a message's part."""
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def data_url(media_type: str, data: bytes) -> str:
    """Return a file as a URL."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def png(colour: str) -> bytes:
    """Return a picture in one colour."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, "PNG")
    return file.getvalue()


def film(first: str, last: str) -> bytes:
    """Return two seconds of an animation that goes from one colour to another."""
    pictures = [Image.new("RGB", (64, 64), first if index < 8 else last) for index in range(16)]
    # Each one differs a little, or they would be kept as two long ones.
    for index, picture in enumerate(pictures):
        picture.putpixel((index, 0), (0, 0, 0))
    file = io.BytesIO()
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=125)
    return file.getvalue()


def run(title: str, check: Callable[[], str]) -> bool:
    """Make a check and print its line of the table; tell whether it did not fail."""
    began = time.monotonic()
    try:
        result, told = "ok", check()
    except SkippedError as error:
        result, told = "skipped", str(error)
    except (FailedError, requests.RequestException, openai.OpenAIError, KeyError, ValueError, TypeError) as error:
        result, told = "FAILED", f"{type(error).__name__}: {error}"
    print(f"{title:<14}{result:<9}{time.monotonic() - began:>7.2f} s  {' '.join(told.split())[:100]}", flush=True)
    return result != "FAILED"


def main() -> int:
    """Make all checks; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_url", help="http://HOST:PORT, or https://api.runpod.ai/v2/ENDPOINT_ID")
    parser.add_argument("--image-url", help="an image at a public address, for the worker to fetch")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one answer, a cold start included")
    options = parser.parse_args()
    worker = Worker(options.base_url, options.image_url, options.timeout)
    checks: dict[str, Callable[[], str]] = {
        "health": worker.health,
        "info": worker.info,
        "models": worker.models,
        "text": worker.text,
        "streaming": worker.streaming,
        "image": worker.image,
        "image by URL": worker.image_by_url,
        "video": worker.video,
        "errors": worker.errors,
    }
    with worker.http, worker.client:
        passed = [run(title, check) for title, check in checks.items()]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
