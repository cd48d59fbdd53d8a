"""Ask an endpoint a question, about images, videos, sounds and documents if you like.

    RUNPOD_API_KEY=… python examples/client.py --endpoint ENDPOINT_ID "Tell me a story" --stream
    RUNPOD_API_KEY=… python examples/client.py --endpoint ENDPOINT_ID "What is this?" --image photo.jpg
    API_KEY=… python examples/client.py --base-url http://127.0.0.1:8000/v1 "What happens?" --video film.mp4
    API_KEY=… python examples/client.py --base-url http://127.0.0.1:8000/v1 "Sum up" --document report.pdf

With --endpoint, the question is a job in the endpoint's queue, and the job's status is shown until text arrives. With
--base-url, it is a request in OpenAI's protocol. Needs: pip install openai requests
"""

import argparse
import base64
import json
import mimetypes
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import requests

RUNPOD = "https://api.runpod.ai/v2"
MAX_JOB_BYTES = 10_000_000
"""RunPod's limit for the input of a job."""
POLL_SECONDS = 0.5


class NoAnswerError(Exception):
    """The question cannot be answered. The message is for the user."""


class Progress:
    """Shows the current status: on a terminal in one line that changes, elsewhere in a new line for each change."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._last = ""

    def show(self, status: str) -> None:
        """Show `status`, and on a terminal the seconds since the start."""
        if sys.stderr.isatty():
            print(f"\r\033[K{status}, {time.monotonic() - self._began:.0f} s", end="", file=sys.stderr, flush=True)
        elif status != self._last:
            print(status, file=sys.stderr, flush=True)
        self._last = status

    def clear(self) -> None:
        """Remove the line from the terminal, so that text can follow."""
        if self._last and sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        self._last = ""


progress = Progress()


def main() -> int:
    """Print the answer and return the exit code."""
    options = parse_arguments()
    try:
        messages = [{"role": "user", "content": content(options)}]
        pieces = ask_endpoint(options, messages) if options.endpoint else ask_server(options, messages)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    except (NoAnswerError, OSError, openai.OpenAIError) as error:
        # The errors of requests are OSErrors.
        progress.clear()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="the question")
    for flag in ("--image", "--video", "--sound", "--document"):
        parser.add_argument(flag, action="append", default=[], metavar="FILE_OR_URL", help="may be repeated")
    parser.add_argument("--upload-url", help="for --endpoint: a link for PUT, for an answer above RunPod's 20 MB")
    parser.add_argument("--stream", action="store_true", help="print the text as it arrives")
    parser.add_argument("--max-tokens", type=int, default=500)
    parser.add_argument("--model", help="for --base-url: the model's name (default: the first model of the server)")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--endpoint", metavar="ENDPOINT_ID", help="a RunPod endpoint; set its key in RUNPOD_API_KEY")
    target.add_argument("--base-url", help="another server's URL, with /v1; set its key in API_KEY")
    parser.add_argument("--api", default=RUNPOD, help="RunPod's API, or a stand-in for it (default: %(default)s)")
    return parser.parse_args()


def content(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the message's parts: files, then the text."""
    media = [("image", options.image), ("video", options.video), ("audio", options.sound)]
    parts = [
        {"type": f"{kind}_url", f"{kind}_url": {"url": as_url(source, kind)}}
        for kind, files in media
        for source in files
    ]
    return [*parts, *map(document, options.document), {"type": "text", "text": options.text}]


def document(source: str) -> dict[str, Any]:
    """Return the part for a PDF."""
    url = as_url(source, "application/pdf")
    return {"type": "file", "file": {"file_data" if url.startswith("data:") else "file_url": url}}


def as_url(source: str, kind: str) -> str:
    """Return a URL unchanged, and a file as a `data:` URL. `kind` is the beginning of its media type."""
    if source.startswith(("http://", "https://", "data:")):
        return source
    media_type = mimetypes.guess_type(source)[0] or ""
    if not media_type.startswith(kind) and (kind, media_type) != ("video", "image/gif"):
        raise NoAnswerError(f"The extension of {source} is not one of {kind} files.")
    return f"data:{media_type};base64,{base64.b64encode(Path(source).read_bytes()).decode()}"


# ---- A server with OpenAI's protocol


def ask_server(options: argparse.Namespace, messages: Any) -> Iterator[str]:
    """Yield the text of the answer."""
    with openai.OpenAI(base_url=options.base_url, api_key=os.environ.get("API_KEY", "none")) as client:
        progress.show("waiting for the server")
        model = options.model or next(iter(client.models.list())).id
        fields: Any = {"model": model, "messages": messages, "max_tokens": options.max_tokens}
        if not options.stream:
            text = client.chat.completions.create(**fields).choices[0].message.content
            progress.clear()
            yield text or ""
            return
        for chunk in client.chat.completions.create(**fields, stream=True):
            if chunk.choices and (text := chunk.choices[0].delta.content):
                progress.clear()
                yield text


# ---- A job in the queue of a RunPod endpoint


def ask_endpoint(options: argparse.Namespace, messages: Any) -> Iterator[str]:
    """Yield the text of the answer. Shows the job's status until text arrives."""
    if not (key := os.environ.get("RUNPOD_API_KEY")):
        raise NoAnswerError("RUNPOD_API_KEY is not set.")
    job_input = {"messages": messages, "max_tokens": options.max_tokens, "stream": options.stream}
    if options.upload_url:
        job_input["upload_url"] = options.upload_url
    body = json.dumps({"input": job_input})
    if len(body) > MAX_JOB_BYTES:
        raise NoAnswerError(f"The job has {len(body):,} bytes, RunPod accepts {MAX_JOB_BYTES:,}. Use links, not files.")
    url = f"{options.api}/{options.endpoint}"
    with requests.Session() as session:
        session.headers.update({"Authorization": f"Bearer {key}", "Content-Type": "application/json"})
        job_id = json_of(session.post(f"{url}/run", data=body, timeout=60))["id"]
        try:
            yield from follow(session, url, job_id, options.stream)
        except KeyboardInterrupt:
            session.post(f"{url}/cancel/{job_id}", timeout=60)
            raise


def follow(session: requests.Session, url: str, job_id: str, stream: bool) -> Iterator[str]:
    """Yield the job's text until the job has ended."""
    status, parts = "IN_QUEUE", list[Any]()
    # The last parts of a stream may arrive after the job has ended.
    while parts or status in ("IN_QUEUE", "IN_PROGRESS"):
        answer = json_of(session.get(f"{url}/{'stream' if stream else 'status'}/{job_id}", timeout=60))
        status, parts = answer["status"], answer.get("stream", [])
        for text in filter(None, (text_of(part["output"]) for part in parts)):
            progress.clear()
            yield text
        if not parts and status in ("IN_QUEUE", "IN_PROGRESS"):
            progress.show(status)
            time.sleep(POLL_SECONDS)
    progress.clear()
    if status != "COMPLETED":
        answer = json_of(session.get(f"{url}/status/{job_id}", timeout=60))
        raise NoAnswerError(f"The job ended with status {status}: {reason(answer.get('error'))}")
    if not stream:
        yield text_of(whole(answer["output"]))


def whole(output: Any) -> Any:
    """Return a job's output. The worker stores one that is too large for the queue, and returns a link to it."""
    if not (isinstance(output, dict) and "result_url" in output):
        return output
    return json_of(requests.get(output["result_url"], timeout=600))


def text_of(output: Any) -> str:
    """Return the text of a job's output: OpenAI's response object or chunk, or a list of them."""
    if isinstance(output, list):
        return "".join(map(text_of, output))
    choices = output.get("choices") or [{}]
    return (choices[0].get("message") or choices[0].get("delta") or {}).get("content") or ""


def reason(error: str | None) -> str:
    """Return the message of a job's error. The worker's errors are OpenAI's error objects in JSON."""
    try:
        return str(json.loads(error or "")["message"])
    except (ValueError, KeyError, TypeError):
        return error or "RunPod gives no reason"


def json_of(response: requests.Response) -> Any:
    """Return the body of RunPod's response."""
    if response.status_code == 401:
        raise NoAnswerError("RunPod does not accept the key in RUNPOD_API_KEY.")
    if response.status_code == 404:
        raise NoAnswerError("RunPod has no endpoint with this ID.")
    if not response.ok:
        raise NoAnswerError(f"RunPod answered with HTTP {response.status_code}: {response.text[:500]}")
    return response.json()


if __name__ == "__main__":
    sys.exit(main())
