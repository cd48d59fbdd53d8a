"""A worker that runs the batches of HTTP callers with a scripted engine, to be killed at any moment.

`python -m tests.support.http_batch_worker FOLDER ASKED`. It appends the text of each request to the file ASKED, and
prints its port once it serves.
"""

import asyncio
import json
import os
import random
import sys
import threading
from pathlib import Path
from typing import Any

from tests.support.batches import answer
from tests.support.http_batches import serving_batches
from worker.request.asgi import Receive, Send


def main(folder: str, asked: str) -> None:
    file = os.open(asked, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    async def chats(_scope: Any, receive: Receive, send: Send) -> None:
        text = json.loads((await receive())["body"])["messages"][0]["content"]
        os.write(file, f"{text}\n".encode())
        await asyncio.sleep(random.random() * 0.02)
        status = 400 if text.endswith("7") else 200
        body = {"error": {"message": "wrong", "code": 400}} if status == 400 else answer(1)
        await send(
            {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]}
        )
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})

    with serving_batches(Path(folder), chats) as worker:
        print(worker.port, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
