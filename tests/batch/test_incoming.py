"""Uploads that arrive at the same time."""

from pathlib import Path

import pytest

from worker.batch.incoming import Incoming
from worker.batch.objects import DAY
from worker.batch.store import PUBLIC, Store
from worker.errors import BatchFullError


def test_of_several_uploads_at_once_those_are_kept_for_which_there_is_room(tmp_path: Path) -> None:
    store = Store(tmp_path / "batches", DAY, 2500)
    store.prepare()
    uploads = []
    for _ in range(8):
        store.make_room(PUBLIC, "files", 900)
        uploads.append(Incoming(store, PUBLIC))
    for upload in uploads:
        upload.write(bytes(900))
    for upload in uploads[:2]:
        upload.keep("a", DAY)
    for upload in uploads[2:]:
        with pytest.raises(BatchFullError, match="MAX_BATCH_FOLDER_BYTES=2500"):
            upload.keep("a", DAY)
    for upload in uploads:
        upload.discard()
    assert len(store.ids(PUBLIC, "files")) == 2
    assert len(list((store.folder / PUBLIC / "files").iterdir())) == 4
