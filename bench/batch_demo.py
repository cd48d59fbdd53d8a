"""`make batch-demo`: answers 500 lines with the embedded model, half of them about images, and counts right answers."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.support import tiny
from tests.support.media import COLOURS, image_url
from tests.support.tiny import ROOT

LINES = 500
GREETING = "Hello! How can I help you?"


def questions() -> Iterator[tuple[str, object, str]]:
    """Yield the id, the message and the right answer of each line."""
    for number in range(LINES):
        colour = COLOURS[number % len(COLOURS)]
        if number % 2:
            image = {"type": "image_url", "image_url": {"url": image_url(colour)}}
            content = [image, {"type": "text", "text": "What is this?"}]
            yield f"image-{number}", content, f"The image is {colour}."
        else:
            yield f"text-{number}", "Hello", GREETING


def line(custom_id: str, content: object) -> str:
    """Return a line of a batch."""
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body})


def answer(result: str) -> tuple[str, str]:
    """Return the id and the text of a result."""
    value = json.loads(result)
    return value["custom_id"], value["response"]["body"]["choices"][0]["message"]["content"]


def main() -> int:
    """Run the batch in a temporary folder. The exit code is 0 if every answer is right."""
    expected = {custom_id: text for custom_id, _, text in questions()}
    with tempfile.TemporaryDirectory() as folder:
        source, output, log = (Path(folder) / name for name in ("in.jsonl", "out.jsonl", "log"))
        source.write_text("".join(f"{line(custom_id, content)}\n" for custom_id, content, _ in questions()))
        command = [sys.executable, "handler.py", "--batch", str(source), "--out", str(output)]
        # The bar is shown on a terminal, between few lines of the log.
        environment = {**os.environ, **tiny.environment(), "LOG_LEVEL": "WARNING", "VLLM_LOGGING_LEVEL": "ERROR"}
        with log.open("wb") as errors:
            stderr = None if sys.stderr.isatty() else errors
            code = subprocess.run(command, cwd=ROOT, env=environment, stderr=stderr, check=False).returncode
        if code:
            sys.stderr.write(log.read_text()[-3000:])
            return code
        answers = dict(map(answer, output.read_text().splitlines()))
    right = sum(answers.get(custom_id) == text for custom_id, text in expected.items())
    sys.stdout.write(f"{right} of {len(expected)} answers are right.\n")
    return 0 if right == len(expected) else 1


if __name__ == "__main__":
    sys.exit(main())
