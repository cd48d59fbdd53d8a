"""The memory of a decoder process, on which all of its operations work."""

import ctypes
import mmap
import os
import resource


class Workspace:
    """The shared memory, which holds the file to decode first, then the result; and the limit for all other memory."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._statistics = os.open("/proc/self/statm", os.O_RDONLY)

    def _file(self, size: int) -> bytes:
        return self._memory[:size]

    def _limit(self, size: int) -> None:
        """Let this process have `size` more bytes of address space than now."""
        pages = int(os.pread(self._statistics, 100, 0).split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + size, resource.RLIM_INFINITY))
