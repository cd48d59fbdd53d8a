"""Threads with an event loop, in a process that forks: they pause meanwhile, and the child closes their sockets."""

import asyncio
import os
import threading
import weakref

import psutil

PAUSE_SECONDS = 5.0


class PausedInForks:
    """Pauses the loop of a thread while this process forks, for as long as this object exists.

    In the child, a lock that the thread holds would never be released. The callbacks cannot be removed; once the object
    is gone they do nothing.
    """

    def __init__(self, thread: threading.Thread, loop: asyncio.AbstractEventLoop) -> None:
        self._thread = thread
        self._loop = loop
        self._resume = threading.Event()
        reference = weakref.ref(self)

        def before() -> None:
            if (paused := reference()) is not None:
                paused._pause()

        def after_in_child() -> None:
            if reference() is not None:
                _close_inherited()

        os.register_at_fork(before=before, after_in_parent=self._resume.set, after_in_child=after_in_child)

    def _pause(self) -> None:
        if threading.current_thread() is self._thread or not self._thread.is_alive():
            return
        paused = threading.Event()
        self._resume.clear()

        def pause() -> None:
            paused.set()
            self._resume.wait()

        try:
            self._loop.call_soon_threadsafe(pause)
        except RuntimeError:
            # The loop has just ended.
            return
        paused.wait(timeout=PAUSE_SECONDS)


def _close_inherited() -> None:
    """Close the parent's sockets in a forked child: its ports would stay taken, and its connections open."""
    for connection in psutil.Process().net_connections("inet"):
        os.close(connection.fd)
