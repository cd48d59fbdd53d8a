"""The batches of HTTP callers: their order, their ends, and what a restart finds."""

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

import pytest

from tests.http.serving import ServedWorker, serving, wait_until
from tests.support.batches import disk_full_after
from tests.support.http_batches import Chats, client, create, ended, names_in, serving_batches, upload
from tests.support.tiny import ROOT
from worker.batch import retention
from worker.batch.objects import DAY
from worker.batch.store import PUBLIC, Store
from worker.errors import ConfigurationError, StorageError

HOLDER = """
import sys, time
from pathlib import Path
from worker.batch.store import PUBLIC, Store
lock = Store(Path(sys.argv[1]), 1, 1).lock(PUBLIC, sys.argv[2])
print("locked" if lock else "busy", flush=True)
time.sleep(60)
"""


def release(worker: ServedWorker, chats: Chats) -> None:
    worker.server.notify(chats.release)


def store_of(folder: Path) -> Store:
    return Store(folder, 30 * DAY, 10**9)


def change(folder: Path, batch_id: str, **fields: object) -> None:
    """Change a batch on the disk."""
    store = store_of(folder)
    store.save(PUBLIC, store.batch(PUBLIC, batch_id).model_copy(update=fields))


def result_ids(folder: Path, name: str) -> list[str]:
    path = store_of(folder).content(PUBLIC, name)
    return [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]


def test_batches_run_one_at_a_time_in_the_order_of_their_creation(tmp_path: Path) -> None:
    chats = Chats()
    with serving_batches(tmp_path, chats, worker_api_key=("one", "two")) as worker:
        first, second = client(worker, "one"), client(worker, "two")
        running = create(first, upload(first, "wait"))
        wait_until("the first batch runs", lambda: chats.texts == ["wait"])
        files = {text: upload(api, text) for api, text in ((first, "c"), (second, "a"), (first, "b"))}
        waiting = []
        for api, text in ((second, "a"), (first, "b"), (first, "c")):
            waiting.append((api, create(api, files[text])))
            time.sleep(0.002)
        assert [api.batches.retrieve(name).status for api, name in waiting] == ["validating"] * 3
        assert first.batches.retrieve(running).status == "in_progress"
        assert worker.get("/health").json()["batch"]["job"] == running
        release(worker, chats)
        for api, name in waiting:
            assert ended(api, name).status == "completed"
        assert chats.texts == ["wait", "a", "b", "c"]


def test_a_batch_that_runs_shows_its_progress_and_can_be_cancelled(tmp_path: Path) -> None:
    chats = Chats()
    with serving_batches(tmp_path, chats) as worker:
        api = client(worker)
        file_id = upload(api, "a", "wrong", "b", "wait")
        batch_id = create(api, file_id)

        def counts() -> tuple[int, int, int]:
            counts = api.batches.retrieve(batch_id).request_counts
            assert counts is not None
            return counts.total, counts.completed, counts.failed

        wait_until("the progress is shown", lambda: counts() == (4, 2, 1))
        with pytest.raises(Exception, match="still needs the file"):
            api.files.delete(file_id)
        began = time.monotonic()
        assert api.batches.cancel(batch_id).status in ("cancelling", "cancelled")
        batch = ended(api, batch_id)
        assert time.monotonic() - began < 5
        assert batch.status == "cancelled"
        assert batch.cancelled_at
        assert batch.cancelling_at
        assert batch.cancelled_at >= batch.cancelling_at
        assert counts() == (4, 2, 1)
        good, bad = batch.output_file_id or "", batch.error_file_id or ""
        assert '"id-0"' in api.files.content(good).text
        assert '"id-1"' not in api.files.content(good).text
        assert api.files.content(bad).text.count("\n") == 1
        assert api.files.delete(file_id).deleted
        assert not {name for name in names_in(tmp_path) if name.endswith((".lock", ".cancel", ".part", ".tmp"))}
        assert not {name for name in names_in(tmp_path) if name.startswith(".batch-unfinished")}
        # The next one runs.
        assert ended(api, create(api, upload(api, "a"))).status == "completed"


class WithoutLocks(Store):
    """A store on a file system that knows no locks."""

    def lock(self, owner: str, batch_id: str) -> BinaryIO:
        return (self.folder / owner / "batches" / f"{batch_id}.lock").open("ab")


def test_a_batch_that_runs_can_be_cancelled_where_files_cannot_be_locked(tmp_path: Path) -> None:
    chats = Chats()
    with serving_batches(tmp_path, chats) as worker:
        assert worker.batches is not None
        worker.batches.store = WithoutLocks(tmp_path, 30 * DAY, 10**9)
        api = client(worker)
        batch_id = create(api, upload(api, "a", "wait"))
        wait_until("the second line runs", lambda: "wait" in chats.texts)
        assert api.batches.cancel(batch_id).status == "cancelling"
        assert ended(api, batch_id).status == "cancelled"
        assert ended(api, create(api, upload(api, "b"))).status == "completed"
        assert api.batches.retrieve(batch_id).status == "cancelled"


def test_a_batch_that_waits_is_cancelled_at_once(tmp_path: Path) -> None:
    chats = Chats()
    with serving_batches(tmp_path, chats) as worker:
        api = client(worker)
        create(api, upload(api, "wait"))
        wait_until("the first batch runs", lambda: chats.texts == ["wait"])
        batch = api.batches.cancel(create(api, upload(api, "a")))
        assert (batch.status, batch.output_file_id, batch.error_file_id) == ("cancelled", None, None)
        release(worker, chats)
    assert chats.texts == ["wait"]


def test_a_stop_leaves_a_batch_and_the_next_worker_goes_on(tmp_path: Path) -> None:
    chats = Chats()
    with serving_batches(tmp_path, chats) as worker:
        api = client(worker)
        running = create(api, upload(api, "a", "wrong", "b", "wait"))
        waiting = create(api, upload(api, "c"))
        wait_until("lines have ended", lambda: len(chats.texts) == 4)
    left = store_of(tmp_path).batch(PUBLIC, running)
    assert left.status == "in_progress"
    again = Chats()
    with serving_batches(tmp_path, again) as worker:
        wait_until("the batch goes on", lambda: again.texts == ["wait"])
        release(worker, again)
        api = client(worker)
        batch = ended(api, running)
        assert (batch.status, batch.in_progress_at) == ("completed", left.in_progress_at)
        assert ended(api, waiting).status == "completed"
    # Lines that ended are not asked again.
    assert again.texts == ["wait", "c"]
    stored = store_of(tmp_path).batch(PUBLIC, running)
    assert stored.request_counts.model_dump() == {"total": 4, "completed": 3, "failed": 1}
    assert result_ids(tmp_path, stored.output_id) == ["id-0", "id-2", "id-3"]
    assert result_ids(tmp_path, stored.errors_id) == ["id-1"]


@pytest.mark.parametrize("status", ["in_progress", "finalizing"])
def test_a_worker_that_was_killed_before_it_noted_the_end_notes_it_later(tmp_path: Path, status: str) -> None:
    chats = Chats()
    with serving_batches(tmp_path, chats) as worker:
        batch = ended(client(worker), create(client(worker), upload(client(worker), "a", "wrong")))
    asked = len(chats.texts)
    change(tmp_path, batch.id, status=status, completed_at=None, output_file_id=None, error_file_id=None)
    with serving_batches(tmp_path, chats) as worker:
        again = ended(client(worker), batch.id)
    assert again.to_dict() | {"completed_at": 0} == batch.to_dict() | {"completed_at": 0}
    assert len(chats.texts) == asked


def test_a_batch_that_another_worker_runs_is_left_alone(tmp_path: Path) -> None:
    chats = Chats()
    with serving(batch_folder=str(tmp_path)) as worker:
        api = client(worker)
        theirs = create(api, upload(api, "theirs"))
        time.sleep(0.002)
        ours = create(api, upload(api, "ours"))
    command = [sys.executable, "-c", HOLDER, str(tmp_path), theirs]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "locked\n"
        with serving_batches(tmp_path, chats) as worker:
            api = client(worker)
            assert ended(api, ours).status == "completed"
            # The worker that runs it has to end it.
            assert api.batches.cancel(theirs).status == "cancelling"
            assert chats.texts == ["ours"]
            holder.kill()
            holder.wait()
            batch = ended(api, theirs)
    assert (batch.status, chats.texts) == ("cancelled", ["ours"])


def test_a_batch_expires_with_what_has_ended(tmp_path: Path) -> None:
    chats = Chats()
    with serving_batches(tmp_path, chats) as worker:
        api = client(worker)
        batch_id = create(api, upload(api, "a", "wait"))
        wait_until("both lines run", lambda: len(chats.texts) == 2)
    change(tmp_path, batch_id, expires_at=int(time.time()) - 1)
    with serving_batches(tmp_path, chats) as worker:
        batch = ended(client(worker), batch_id)
        assert batch.status == "expired"
        assert batch.expired_at
        assert client(worker).files.content(batch.output_file_id or "").text.count("\n") == 1


def test_a_full_disk_ends_neither_the_worker_nor_an_upload_without_words(tmp_path: Path) -> None:
    with serving_batches(tmp_path, Chats()) as worker, disk_full_after(100_000):
        api = client(worker)
        with pytest.raises(Exception, match="BATCH_FOLDER cannot be used: File too large") as caught:
            api.files.create(file=os.urandom(3_000_000), purpose="batch")
        assert getattr(caught.value, "status_code", 0) == 507
        assert names_in(tmp_path) == set()
        batch = ended(api, create(api, upload(api, *("a" for _ in range(500)))))
        assert batch.status == "failed"
        assert batch.errors is not None
        (mistake,) = batch.errors.data or []
        assert "the disk is full" in (mistake.message or "")
        assert ended(api, create(api, upload(api, "a"))).status == "completed"


def test_a_batch_whose_failure_cannot_be_saved_goes_on_once_the_disk_has_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chats = Chats()
    # The state of a batch with much metadata is larger than the disk allows.
    metadata = {str(number): "x" * 500 for number in range(16)}
    with serving_batches(tmp_path, chats) as worker:
        api = client(worker)
        batch_id = create(api, upload(api, *("wait" for _ in range(40))), metadata=metadata)
        wait_until("the batch runs", lambda: bool(chats.texts))
        with disk_full_after(5000):
            release(worker, chats)
            wait_until("the failure cannot be saved", lambda: f"{batch_id} does not run" in caplog.text)
            batch = api.batches.retrieve(batch_id)
            assert (batch.status, batch.errors) == ("in_progress", None)
        # A new batch wakes the worker, which then runs the oldest one.
        create(api, upload(api, "a"))
        batch = ended(api, batch_id)
        assert (batch.status, batch.errors, batch.error_file_id) == ("completed", None, None)
    assert result_ids(tmp_path, batch.output_file_id or "") == [f"id-{number}" for number in range(40)]


@pytest.mark.parametrize("is_cancelled", [False, True], ids=["the worker starts again", "it was cancelled meanwhile"])
def test_a_batch_that_failed_stays_failed_if_the_worker_is_killed_before_it_notes_the_end(
    tmp_path: Path, *, is_cancelled: bool
) -> None:
    with serving_batches(tmp_path, Chats()) as worker:
        api = client(worker)
        with disk_full_after(100_000):
            failed = ended(api, create(api, upload(api, *("a" for _ in range(500)))))
        assert failed.status == "failed"
        assert failed.output_file_id
    change(tmp_path, failed.id, status="in_progress", failed_at=None, output_file_id=None)
    if is_cancelled:
        with serving(batch_folder=str(tmp_path)) as worker:
            assert client(worker).batches.cancel(failed.id).status == "failed"
    chats = Chats()
    with serving_batches(tmp_path, chats) as worker:
        again = ended(client(worker), failed.id)
    assert (again.status, again.errors, again.output_file_id) == ("failed", failed.errors, failed.output_file_id)
    assert chats.texts == []


def test_a_batch_can_be_cancelled_while_its_input_is_checked(tmp_path: Path) -> None:
    with serving_batches(tmp_path, Chats()) as worker:
        api = client(worker)
        # One line of 100 GB, which takes minutes to read.
        endless = gzip.compress(bytes(b"0" * 100_000_000)) * 1000
        batch_id = create(api, api.files.create(file=endless, purpose="batch").id)
        wait_until("the input is read", lambda: api.batches.retrieve(batch_id).status == "in_progress")
        began = time.monotonic()
        api.batches.cancel(batch_id)
        assert ended(api, batch_id).status == "cancelled"
        assert time.monotonic() - began < 10


def test_what_is_old_is_removed_but_not_what_an_open_batch_needs(tmp_path: Path) -> None:
    chats, now = Chats(), time.time()
    with serving_batches(tmp_path, chats) as worker:
        api = client(worker)
        old = ended(api, create(api, upload(api, "old")))
        needed = upload(api, "done", "wait")
        running = create(api, needed)
        wait_until("the batch runs", lambda: "wait" in chats.texts)
        unused = upload(api, "unused")
    store = store_of(tmp_path)
    stray = store.content(PUBLIC, "file-" + "0" * 32).with_suffix(".data.tmp")
    stray.write_bytes(b"incomplete")
    retention.remove_old(store, now)
    assert (store.file(PUBLIC, unused).id, stray.exists()) == (unused, True)
    # Batches that have not ended expire, which is the service's task.
    retention.remove_old(store, now + 31 * DAY)
    assert store.file(PUBLIC, needed).id == needed
    part = f"{store.content(PUBLIC, store.batch(PUBLIC, running).output_id).name}.part"
    names = names_in(tmp_path)
    assert {f"{needed}.json", f"{needed}.data", f"{running}.json", part} <= names
    assert not {name for name in names if old.id in name or unused in name or (old.output_file_id or "x") in name}
    assert not stray.exists()


def test_a_damaged_state_is_ignored(tmp_path: Path) -> None:
    with serving_batches(tmp_path, Chats()) as worker:
        api = client(worker)
        batch = ended(api, create(api, upload(api, "a")))
        (tmp_path / PUBLIC / "batches" / f"{batch.id}.json").write_text("{")
        assert list(api.batches.list()) == []
        assert ended(api, create(api, upload(api, "a"))).status == "completed"


def test_the_folder_above_must_exist_so_that_a_missing_volume_is_noticed(tmp_path: Path) -> None:
    store_of(tmp_path / "new").prepare()
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    for folder in ("no/volume", "file"):
        with pytest.raises(ConfigurationError, match="cannot be used"):
            store_of(tmp_path / folder).prepare()


def test_a_volume_that_disappears_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    store = store_of(tmp_path / "volume" / "batches")
    with pytest.raises(StorageError, match="No such file or directory"):
        store.make_room(PUBLIC, "files")
    assert names_in(tmp_path) == set()
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_cannot_be_ended_does_not_stop_the_others(tmp_path: Path) -> None:
    with serving(batch_folder=str(tmp_path)) as worker:
        api = client(worker)
        damaged = create(api, upload(api, "a"))
        time.sleep(0.002)
        later = create(api, upload(api, "b"))
    store = store_of(tmp_path)
    store.content(PUBLIC, store.batch(PUBLIC, damaged).output_id).write_text("something else\n")
    with serving_batches(tmp_path, Chats()) as worker:
        assert ended(client(worker), later).status == "completed"
        assert client(worker).batches.retrieve(damaged).status == "in_progress"
