"""Ask an endpoint a question, with pictures and films if you like.

    RUNPOD_API_KEY=… python examples/client.py --endpoint ENDPOINT_ID "Tell me a story" --stream
    RUNPOD_API_KEY=… python examples/client.py --endpoint ENDPOINT_ID "What is this?" --image photo.jpg
    API_KEY=… python examples/client.py --base-url http://127.0.0.1:8000/v1 "What happens?" --video film.mp4

A RunPod endpoint is asked with a job of its queue, whose status is shown until there is text; any other server with
OpenAI's protocol. Needs: pip install openai requests
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
LARGEST_JOB = 10_000_000
"""Bytes that RunPod takes as one job's input."""
POLL_SECONDS = 0.5


class AskError(Exception):
    """There is no answer; the text says why."""


class Progress:
    """What is waited for: on a terminal one line that changes, elsewhere a line for each change."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._last = ""

    def show(self, status: str) -> None:
        """Tell what is waited for."""
        if sys.stderr.isatty():
            print(f"\r\033[K{status}, {time.monotonic() - self._began:.0f} s", end="", file=sys.stderr, flush=True)
        elif status != self._last:
            print(status, file=sys.stderr, flush=True)
        self._last = status

    def clear(self) -> None:
        """Make room for text."""
        if self._last and sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        self._last = ""


progress = Progress()


def main() -> int:
    """Print the answer; return the exit code."""
    options = parse_arguments()
    try:
        messages = [{"role": "user", "content": content(options)}]
        pieces = ask_endpoint(options, messages) if options.endpoint else ask_server(options, messages)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    except (AskError, OSError, openai.OpenAIError) as error:
        # What requests raises is an OSError too.
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
    parser.add_argument("--image", action="append", default=[], metavar="FILE_OR_URL", help="may be given again")
    parser.add_argument("--video", action="append", default=[], metavar="FILE_OR_URL", help="may be given again")
    parser.add_argument("--stream", action="store_true", help="print the text as it comes")
    parser.add_argument("--max-tokens", type=int, default=500)
    parser.add_argument("--model", help="for --base-url: the model's name, by default the first one that it serves")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--endpoint", metavar="ENDPOINT_ID", help="a RunPod endpoint; its key is RUNPOD_API_KEY")
    where.add_argument("--base-url", help="another server's address, with /v1; its key is API_KEY")
    parser.add_argument("--api", default=RUNPOD, help="RunPod's API, or a stand-in for it (default: %(default)s)")
    return parser.parse_args()


def content(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the message's parts: images, videos, text."""
    media = [("image", source) for source in options.image] + [("video", source) for source in options.video]
    parts: list[dict[str, Any]] = [
        {"type": f"{kind}_url", f"{kind}_url": {"url": as_url(source, kind)}} for kind, source in media
    ]
    return [*parts, {"type": "text", "text": options.text}]


def as_url(source: str, kind: str) -> str:
    """Return a URL as it is, and a file as a `data:` URL."""
    if source.startswith(("http://", "https://", "data:")):
        return source
    media_type = mimetypes.guess_type(source)[0] or ""
    if not media_type.startswith(f"{kind}/") and media_type != "image/gif":
        raise AskError(f"{source} does not look like the file of {'an' if kind == 'image' else 'a'} {kind}.")
    return f"data:{media_type};base64,{base64.b64encode(Path(source).read_bytes()).decode()}"


# ---- A server with OpenAI's protocol


def ask_server(options: argparse.Namespace, messages: Any) -> Iterator[str]:
    """Yield the answer's text."""
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


# ---- A RunPod endpoint, by a job of its queue


def ask_endpoint(options: argparse.Namespace, messages: Any) -> Iterator[str]:
    """Yield the answer's text; show the job's status while there is none."""
    if not (key := os.environ.get("RUNPOD_API_KEY")):
        raise AskError("RUNPOD_API_KEY is not set.")
    job_input = {"messages": messages, "max_tokens": options.max_tokens, "stream": options.stream}
    body = json.dumps({"input": job_input})
    if len(body) > LARGEST_JOB:
        raise AskError(f"The job has {len(body):,} bytes and RunPod takes {LARGEST_JOB:,}: give links, not files.")
    url = f"{options.api}/{options.endpoint}"
    with requests.Session() as session:
        session.headers.update({"Authorization": f"Bearer {key}", "Content-Type": "application/json"})
        job_id = result(session.post(f"{url}/run", data=body, timeout=60))["id"]
        try:
            yield from follow(session, url, job_id, options.stream)
        except KeyboardInterrupt:
            session.post(f"{url}/cancel/{job_id}", timeout=60)
            raise


def follow(session: requests.Session, url: str, job_id: str, stream: bool) -> Iterator[str]:
    """Yield a job's text until it has ended."""
    status, parts = "IN_QUEUE", list[Any]()
    # What is left of a stream comes after its job has ended.
    while parts or status in ("IN_QUEUE", "IN_PROGRESS"):
        answer = result(session.get(f"{url}/{'stream' if stream else 'status'}/{job_id}", timeout=60))
        status, parts = answer["status"], answer.get("stream", [])
        for text in filter(None, (text_of(part["output"]) for part in parts)):
            progress.clear()
            yield text
        if not parts and status in ("IN_QUEUE", "IN_PROGRESS"):
            progress.show(status)
            time.sleep(POLL_SECONDS)
    progress.clear()
    if status != "COMPLETED":
        answer = result(session.get(f"{url}/status/{job_id}", timeout=60))
        raise AskError(f"The job is {status}: {reason(answer.get('error'))}")
    if not stream:
        yield text_of(answer["output"])


def text_of(output: Any) -> str:
    """Return the text of what a job gives: whole answers, or lists of a stream's chunks."""
    if isinstance(output, list):
        return "".join(map(text_of, output))
    choices = output.get("choices") or [{}]
    return (choices[0].get("message") or choices[0].get("delta") or {}).get("content") or ""


def reason(error: str | None) -> str:
    """Return the worker's words; it tells an error as OpenAI's error object, in JSON."""
    try:
        return str(json.loads(error or "")["message"])
    except (ValueError, KeyError, TypeError):
        return error or "no reason was given"


def result(answer: requests.Response) -> Any:
    """Return the body of RunPod's answer."""
    if answer.status_code == 401:
        raise AskError("RunPod does not take this RUNPOD_API_KEY.")
    if answer.status_code == 404:
        raise AskError("RunPod knows no such endpoint.")
    if not answer.ok:
        raise AskError(f"RunPod answered with HTTP {answer.status_code}: {answer.text[:500]}")
    return answer.json()


if __name__ == "__main__":
    sys.exit(main())
