"""Hold a conversation with one worker behind RunPod's load balancer, whose prefix cache has the turns before.

    RUNPOD_API_KEY=… python examples/conversation.py --endpoint ENDPOINT_ID "Who was Ada Lovelace?" "When was she born?"
    API_KEY=… python examples/conversation.py --base-url http://127.0.0.1:8000/v1 "Hello" --affinity strict

Each argument is a turn. The load balancer names the worker of a response in the header X-Runpod-Worker-Id; the next
request sends it back. Set WORKER_API_KEY if the worker has a key of its own. Needs: pip install openai
"""

import argparse
import os
import sys
from typing import Any

import openai

HEADER = "X-Runpod-Worker-Id"
AFFINITY = {"soft": "", "strict": "strict ", "strict-resume": "strict-resume "}
"""What comes before the worker's id. Soft: another worker may answer if that one is busy or gone."""


def main() -> int:
    """Ask the turns one after the other and return the exit code."""
    options = parse_arguments()
    try:
        converse(connect(options), options)
    except (ValueError, openai.OpenAIError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("turns", nargs="+", metavar="TURN")
    parser.add_argument("--affinity", choices=AFFINITY, default="soft", help="default: %(default)s")
    parser.add_argument("--model", help="the model's name (default: the first model of the server)")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--endpoint", metavar="ENDPOINT_ID", help="a load-balancing endpoint; needs RUNPOD_API_KEY")
    target.add_argument("--base-url", help="another server's URL, with /v1; set its key in API_KEY")
    return parser.parse_args()


def connect(options: argparse.Namespace) -> openai.OpenAI:
    """Return a client. RunPod reads its own key in `Authorization`, and the worker reads `x-api-key`."""
    if options.endpoint:
        base_url, key = f"https://{options.endpoint}.api.runpod.ai/v1", os.environ.get("RUNPOD_API_KEY", "")
        if not key:
            raise ValueError("RUNPOD_API_KEY is not set")
    else:
        base_url, key = options.base_url, os.environ.get("API_KEY", "none")
    own_key = os.environ.get("WORKER_API_KEY")
    return openai.OpenAI(base_url=base_url, api_key=key, default_headers={"x-api-key": own_key} if own_key else {})


def converse(client: openai.OpenAI, options: argparse.Namespace) -> None:
    """Send each turn with all turns before it, to the worker that answered last, and print the answers."""
    model = options.model or next(iter(client.models.list())).id
    messages: list[Any] = []
    worker = ""
    for turn in options.turns:
        messages.append({"role": "user", "content": turn})
        headers = {HEADER: AFFINITY[options.affinity] + worker} if worker else {}
        response = client.chat.completions.with_raw_response.create(
            model=model, messages=messages, extra_headers=headers
        )
        worker = response.headers.get(HEADER, "")
        answer = response.parse().choices[0].message.content or ""
        messages.append({"role": "assistant", "content": answer})
        print(f"{worker}: {answer}" if worker else answer, flush=True)


if __name__ == "__main__":
    sys.exit(main())
