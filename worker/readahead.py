"""Reads the files that a start needs into the page cache, so that imports need not wait for a cold disk.

`builder/list_files.py` lists them while the image is built. Each line is the offset and the length of a part of a file,
in bytes, and the file's path; the length 0 means up to the end.
"""

import os
import threading
from contextlib import suppress
from pathlib import Path

LIST = Path(__file__).with_name("readahead.txt")
STEP_BYTES = 128 << 10
"""How much is asked for at once. Of more, Linux reads only as much as its own limit for reading ahead allows."""


def start(files: Path = LIST) -> None:
    """Read ahead in another process: a thread would slow down the imports. Without a list nothing happens.

    Call it before there are threads: the process is forked.
    """
    if not files.is_file():
        return
    if (process := os.fork()) == 0:
        try:
            _read(files)
        finally:
            os._exit(0)
    threading.Thread(target=_wait, args=[process], daemon=True).start()


def _read(files: Path) -> None:
    with files.open() as lines:
        for line in lines:
            offset, length, path = line.rstrip("\n").split(" ", 2)
            with suppress(OSError):
                _read_part(path, int(offset), int(length))


def _read_part(path: str, offset: int, length: int) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        end = offset + length if length else os.fstat(file).st_size
        for start in range(offset, end, STEP_BYTES):
            os.posix_fadvise(file, start, STEP_BYTES, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(file)


def _wait(process: int) -> None:
    # `processes.end_all` may have waited for it before.
    with suppress(ChildProcessError):
        os.waitpid(process, 0)
