"""Where files lie: the kind of file system, and how much of them is in the page cache."""

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import psutil

NETWORK_TYPES = ("nfs", "lustre", "ceph", "cifs", "smb", "9p", "fuse", "glusterfs")
"""How the names of network file systems begin. Network volumes are often mounted with FUSE."""
LOCAL_TYPES = ("fuseblk", "fuse.fuse-overlayfs")
"""File systems in FUSE whose files lie on a local disk."""
_LIBC = ctypes.CDLL(None, use_errno=True)
SAMPLES = 500
"""How many pages of a file are looked at, evenly spaced."""


def is_network(file: Path) -> bool:
    """Return whether a file lies on a network file system; False if that is unknown."""
    path = file.resolve()
    mounts = [each for each in psutil.disk_partitions(all=True) if path.is_relative_to(each.mountpoint)]
    mount = max(mounts, key=lambda each: len(each.mountpoint), default=None)
    return mount is not None and mount.fstype.startswith(NETWORK_TYPES) and mount.fstype not in LOCAL_TYPES


def cached_share(files: Iterable[Path]) -> float:
    """Return the share of the files' pages that are in the page cache, between 0 and 1, from a sample of them.

    Raises:
        OSError: a file cannot be read, or its file system does not tell.
    """
    sizes_and_shares = [(size, _cached_share(file, size)) for file in files if (size := file.stat().st_size)]
    total = sum(size for size, _ in sizes_and_shares)
    return sum(size * share for size, share in sizes_and_shares) / total if total else 1.0


def _cached_share(file: Path, size: int) -> float:
    step = max(mmap.PAGESIZE, size // SAMPLES // mmap.PAGESIZE * mmap.PAGESIZE)
    sample = range(0, size, step)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), size, prot=mmap.PROT_READ) as pages:
        start = np.frombuffer(pages, np.uint8).ctypes.data
        return sum(_is_cached(start + offset) for offset in sample) / len(sample)


def _is_cached(address: int) -> bool:
    """Return whether the page of a mapped file is in the page cache. This does not read it from the disk.

    Reading without waiting (`RWF_NOWAIT`) would need less, but overlayfs, the file system of an image, refuses it.
    """
    found = ctypes.c_ubyte()
    if _LIBC.mincore(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), ctypes.byref(found)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return bool(found.value & 1)
