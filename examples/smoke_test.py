"""Check in a minute whether a newly deployed worker works.

    API_KEY=… python examples/smoke_test.py http://127.0.0.1:8000
    RUNPOD_API_KEY=… python examples/smoke_test.py https://api.runpod.ai/v2/ENDPOINT_ID

The first form is for a worker in HTTP mode, the second for an endpoint with a queue. Prints a table; the exit code is 1
if a check fails. Checks of media that the model does not accept are skipped. Needs: pip install openai requests pillow
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

UNKNOWN_MODEL = "no-such-model"


class FailedError(Exception):
    """The worker gave a wrong answer."""


class SkippedError(Exception):
    """The check does not apply to this worker."""


class Worker:
    """The worker, through the queue or over HTTP. Each check returns details for the table."""

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
        """The worker describes its engine."""
        engine = self.ask_worker("/info")["engine"]
        self.model, self.limits = engine["served_names"][0], engine["media_limits"]
        return f"{self.model}, vLLM {engine['versions']['vllm']}, {engine['max_model_len']} tokens"

    def models(self) -> str:
        """The worker lists its model."""
        self.model = next(iter(self.client.models.list())).id
        return self.model

    def text(self) -> str:
        """The worker answers a question."""
        return self.ask([{"type": "text", "text": "Hello"}])

    def streaming(self) -> str:
        """The worker streams an answer with its token count."""
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
            raise FailedError(f"the stream has {len(text)} characters and reports {tokens} tokens")
        return f"{tokens} tokens, the first after {first:.2f} s"

    def image(self) -> str:
        """The model recognizes the colour of an image."""
        self.require("image")
        return self.expect("red", "image", data_url("image/png", png("red")), "What colour is this?")

    def image_by_url(self) -> str:
        """The worker fetches an image by its URL."""
        self.require("image")
        if not self.image_url:
            raise SkippedError("needs --image-url")
        return self.ask([part("image", self.image_url), {"type": "text", "text": "What is this?"}])

    def video(self) -> str:
        """The model recognizes a colour in a video."""
        self.require("video")
        return self.expect("blue", "video", data_url("video/gif", film("red", "blue")), "What happens in the video?")

    def errors(self) -> str:
        """The worker reports an error, and answers the next request."""
        body = {"model": UNKNOWN_MODEL, "messages": [{"role": "user", "content": "Hello"}]}
        if self.is_queue:
            job = self.run({"openai_route": "/v1/chat/completions", "openai_input": body})
            error = json.loads(job.get("error", "{}"))
        else:
            error = self.http.post(f"{self.url}/v1/chat/completions", json=body, timeout=self.timeout).json()["error"]
        if error.get("code") != 404 or UNKNOWN_MODEL not in error.get("message", ""):
            raise FailedError(f"wrong error for an unknown model: {error}")
        self.text()
        return str(error["message"])

    def require(self, kind: str) -> None:
        """Skip the check if the model does not accept this kind of media."""
        if self.limits is not None and self.limits.get(kind, 0) == 0:
            raise SkippedError(f"the model accepts no {kind}")

    def expect(self, colour: str, kind: str, url: str, text: str) -> str:
        """Ask about an image or video, check that the answer contains the colour, and return the answer."""
        answer = self.ask([part(kind, url), {"type": "text", "text": text}])
        if colour not in answer.lower():
            raise FailedError(f"the answer does not contain {colour!r}: {answer}")
        return answer

    def ask(self, parts: Any) -> str:
        """Return the model's answer."""
        answer = self.client.chat.completions.create(
            model=self.model, messages=[{"role": "user", "content": parts}], max_tokens=100
        )
        if not (text := answer.choices[0].message.content):
            raise FailedError(f"the answer is empty; finish_reason: {answer.choices[0].finish_reason}")
        return text

    def ask_worker(self, route: str) -> Any:
        """Return the response of one of the worker's own routes. Through the queue this takes a job."""
        if not self.is_queue:
            response = self.http.get(self.url + route, timeout=self.timeout)
            response.raise_for_status()
            return response.json()
        job = self.run({"route": route})
        if job["status"] != "COMPLETED":
            raise FailedError(f"the job ended with status {job['status']}: {job.get('error')}")
        return job["output"][0]

    def run(self, job_input: dict[str, Any]) -> Any:
        """Run a job and return it once it has ended. Waits for a worker that is still starting."""
        response = self.http.post(f"{self.url}/runsync", json={"input": job_input}, timeout=self.timeout)
        response.raise_for_status()
        job, deadline = response.json(), time.monotonic() + self.timeout
        while job["status"] in ("IN_QUEUE", "IN_PROGRESS"):
            if time.monotonic() > deadline:
                raise FailedError(f"the job is still {job['status']} after {self.timeout:.0f} s")
            time.sleep(1)
            response = self.http.get(f"{self.url}/status/{job['id']}", timeout=self.timeout)
            response.raise_for_status()
            job = response.json()
        return job


def part(kind: str, url: str) -> dict[str, Any]:
    """Return the part of a message that contains an image or video."""
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def data_url(media_type: str, data: bytes) -> str:
    """Return a file as a `data:` URL."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def png(colour: str) -> bytes:
    """Return an image file in one colour."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, "PNG")
    return file.getvalue()


def film(first: str, last: str) -> bytes:
    """Return a GIF file of two seconds that changes from one colour to another in the middle."""
    frames = [Image.new("RGB", (64, 64), first if index < 8 else last) for index in range(16)]
    # Pillow merges equal frames into one, so each gets a different pixel.
    for index, frame in enumerate(frames):
        frame.putpixel((index, 0), (0, 0, 0))
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=125)
    return file.getvalue()


def run(title: str, check: Callable[[], str]) -> bool:
    """Run a check and print its line of the table. Return whether it did not fail."""
    began = time.monotonic()
    try:
        result, details = "ok", check()
    except SkippedError as error:
        result, details = "skipped", str(error)
    except (FailedError, requests.RequestException, openai.OpenAIError, KeyError, ValueError, TypeError) as error:
        result, details = "FAILED", f"{type(error).__name__}: {error}"
    print(f"{title:<14}{result:<9}{time.monotonic() - began:>7.2f} s  {' '.join(details.split())[:100]}", flush=True)
    return result != "FAILED"


def main() -> int:
    """Run all checks and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_url", help="http://HOST:PORT, or https://api.runpod.ai/v2/ENDPOINT_ID")
    parser.add_argument("--image-url", help="a public URL of an image for the worker to fetch")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one answer, including a cold start")
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
