"""A child process that decodes untrusted media: `python -m worker.media.decoder SOCKET MEMORY MODULES`.

`pool.py` starts it. If a file makes a decoder crash, hang or use too much memory, only this process ends. It has no
secrets in its environment, and can open neither files nor sockets.

SOCKET and MEMORY are file descriptors. SOCKET carries requests `[operation, arguments…]` and replies, one JSON message
each. A reply is `[null, result]`, or `[class of the error, message]`. MEMORY is shared memory: it holds the file to
decode first, then the pixels or samples. MODULES are the libraries to import, separated by commas.
"""

import ctypes
import json
import mmap
import os
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

from PIL import AvifImagePlugin, Image

from worker.errors import MediaError, MediaTooLargeError
from worker.media.decoder_documents import DocumentDecoder, decode_small_document
from worker.media.decoder_images import ImageDecoder, decode_small_images
from worker.media.decoder_streams import StreamDecoder, decode_silence

DAMAGED = "it cannot be decoded: the file is truncated or damaged, or larger than its header says"
PARENT_POLL_SECONDS = 1.0
PR_SET_NO_NEW_PRIVS = 38


class Decoder(ImageDecoder, StreamDecoder, DocumentDecoder):
    """The operations. Each gets its file from the start of the shared memory, and leaves its result there."""

    def run(self, operation: str, *arguments: Any) -> Any:
        """Run an operation; raise `MediaError` if the media cannot be decoded."""
        return getattr(self, operation)(*arguments)

    def ready(self) -> bool:
        """Answer that the process has started."""
        return True


@contextmanager
def translated() -> Iterator[None]:
    """Raise `MediaError` in place of the errors of the libraries, which are of any type for damaged files."""
    try:
        yield
    except MediaError:
        raise
    except MemoryError:
        raise MediaTooLargeError("decoding it needs more memory than its header justifies") from None
    except Exception:  # noqa: BLE001
        raise MediaError(DAMAGED) from None


def main(socket: int, memory: int, modules: str) -> None:
    """Answer requests until the other end closes the socket (EOFError)."""
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    for module in filter(None, modules.split(",")):
        import_module(module)
    # Nobody reads warnings, and a file may cause any number.
    warnings.simplefilter("ignore")
    # The size of an image is checked by the parent process.
    Image.MAX_IMAGE_PIXELS = None
    AvifImagePlugin.DEFAULT_MAX_THREADS = 2
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection: Connection[Any, Any] = Connection(socket)
    decoder = Decoder(mmap.mmap(memory, 0))
    if "pypdfium2" in modules:
        decode_small_document()
    else:
        decode_small_images()
    if "av" in modules:
        decode_silence()
    ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # From here on no file and no socket can be opened, even if FFmpeg takes a video for a list of them.
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    while True:
        reply: list[Any]
        operation = json.loads(connection.recv_bytes())
        try:
            with translated():
                reply = [None, decoder.run(*operation)]
        except MediaError as error:
            reply = [type(error).__name__, str(error)]
        connection.send_bytes(json.dumps(reply).encode())


def _exit_with_parent(parent: int) -> None:
    """Exit soon after the parent process ends, even while something is being decoded."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    with suppress(EOFError):
        main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
