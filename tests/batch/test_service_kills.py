"""Workers with batches of HTTP callers that are killed at random moments: no line is lost or doubled."""

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.support.batches import item, jsonl
from tests.support.tiny import ROOT
from worker.batch.objects import DAY, BatchObject, FileObject, new_key
from worker.batch.store import PUBLIC, Store

BATCHES, LINES, KILLS = 4, 60, 6
CONCURRENCY = 16


def prepared(folder: Path) -> Store:
    """Return a store with batches that wait."""
    store = Store(folder, 30 * DAY, 10**9)
    folder.mkdir()
    store.make_room(PUBLIC, "files")
    for number in range(BATCHES):
        file_id, batch_id = f"file-{new_key(number)}", f"batch_{new_key(number)}"
        content = jsonl(item(f"id-{line}", f"{number}-{line}") for line in range(LINES))
        store.content(PUBLIC, file_id).write_bytes(content)
        times: dict[str, Any] = {"created_at": number, "expires_at": 2**40}
        store.save(PUBLIC, FileObject(id=file_id, bytes=1, filename="x", purpose="batch", **times))
        store.save(PUBLIC, BatchObject(id=batch_id, endpoint="/v1/chat/completions", input_file_id=file_id, **times))
    return store


def asked_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def is_done(store: Store) -> bool:
    return not store.open_batches()


def test_batches_of_workers_that_are_killed_lose_and_double_no_line(tmp_path: Path) -> None:
    store, asked = prepared(tmp_path / "batches"), tmp_path / "asked"
    kills = 0
    while not is_done(store):
        command = [sys.executable, "-m", "tests.support.http_batch_worker", str(store.folder), str(asked)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as worker:
            assert worker.stdout
            assert worker.stdout.readline()
            goal = asked_lines(asked) + random.randrange(1, 40) if kills < KILLS else BATCHES * LINES * 2
            while asked_lines(asked) < goal and not is_done(store):
                time.sleep(0.001)
            worker.kill()
        kills += 1
    assert kills > KILLS
    for batch in store.objects(PUBLIC, "batches"):
        assert isinstance(batch, BatchObject)
        assert batch.status == "completed"
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (LINES, LINES - LINES // 10, LINES // 10)
        found = [store.content(PUBLIC, name).read_text().splitlines() for name in (batch.output_id, batch.errors_id)]
        ids = [[json.loads(line)["custom_id"] for line in lines] for lines in found]
        assert ids[0] == [f"id-{line}" for line in range(LINES) if line % 10 != 7]
        assert ids[1] == [f"id-{line}" for line in range(LINES) if line % 10 == 7]
    # Only lines that were in flight when the worker was killed were asked again.
    times = Counter(asked.read_text().split())
    assert len(times) == BATCHES * LINES
    assert sum(times.values()) - len(times) <= kills * CONCURRENCY
    names = {path.name for path in store.folder.rglob("*") if path.is_file()}
    assert not {name for name in names if name.endswith((".part", ".tmp"))}
