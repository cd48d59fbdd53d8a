"""Write down what is said in a sound, or translate it into English. The model must be one for speech.

    API_KEY=… python examples/transcribe.py speech.mp3 --base-url http://127.0.0.1:8000/v1
    RUNPOD_API_KEY=… python examples/transcribe.py https://example.com/speech.mp3 --endpoint ENDPOINT_ID --translate

With --endpoint, the sound is part of a job in the endpoint's queue. With --base-url, it is an upload in OpenAI's
protocol. Needs: pip install openai requests
"""

import argparse
import base64
import os
import sys
import time
from pathlib import Path
from typing import Any

import openai
import requests

RUNPOD = "https://api.runpod.ai/v2"


def main() -> int:
    """Print the text and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sound", metavar="FILE_OR_URL")
    parser.add_argument("--translate", action="store_true", help="translate into English")
    parser.add_argument("--language", help="the language that is spoken, such as de (default: the model finds out)")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--endpoint", metavar="ENDPOINT_ID", help="a RunPod endpoint; set its key in RUNPOD_API_KEY")
    target.add_argument("--base-url", help="another server's URL, with /v1; set its key in API_KEY")
    parser.add_argument("--api", default=RUNPOD, help="RunPod's API, or a stand-in for it (default: %(default)s)")
    options = parser.parse_args()
    try:
        print(ask_endpoint(options) if options.endpoint else ask_server(options))
    except (OSError, openai.OpenAIError, RuntimeError) as error:
        # The errors of requests are OSErrors.
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def ask_server(options: argparse.Namespace) -> str:
    """Upload the sound, and return its text."""
    with openai.OpenAI(base_url=options.base_url, api_key=os.environ.get("API_KEY", "none")) as client:
        audio = client.audio.translations if options.translate else client.audio.transcriptions
        model = next(iter(client.models.list())).id
        # The client's translations have no such parameter.
        extra = {"language": options.language} if options.language else {}
        return str(audio.create(model=model, file=content_of(options.sound), extra_body=extra).text)


def content_of(source: str) -> Any:
    """Return the sound as a file to upload."""
    if not is_link(source):
        return Path(source)
    answer = requests.get(source, timeout=60)
    answer.raise_for_status()
    return source.rpartition("/")[2], answer.content


def ask_endpoint(options: argparse.Namespace) -> str:
    """Send the sound, or its link, as a job, and return its text."""
    audio = options.sound
    if not is_link(audio):
        audio = base64.b64encode(Path(audio).read_bytes()).decode()
    job_input = {"audio": audio, "task": "translate" if options.translate else "transcribe"}
    if options.language:
        job_input["language"] = options.language
    url = f"{options.api}/{options.endpoint}"
    with requests.Session() as session:
        session.headers["Authorization"] = f"Bearer {os.environ.get('RUNPOD_API_KEY', '')}"
        job = session.post(f"{url}/runsync", json={"input": job_input}, timeout=300)
        job.raise_for_status()
        # A job that takes longer than RunPod waits is still in progress.
        while (result := job.json())["status"] in ("IN_QUEUE", "IN_PROGRESS"):
            time.sleep(1)
            job = session.get(f"{url}/status/{result['id']}", timeout=60)
            job.raise_for_status()
    if result["status"] != "COMPLETED":
        raise RuntimeError(f"The job ended with status {result['status']}: {result.get('error')}")
    return str(result["output"][0]["text"])


def is_link(source: str) -> bool:
    """Return whether the sound is on a web server."""
    return source.startswith(("http://", "https://"))


if __name__ == "__main__":
    sys.exit(main())
