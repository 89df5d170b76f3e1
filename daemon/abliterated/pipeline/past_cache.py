"""Large writes that reach the disk past the page cache: nothing is copied by a processor, what is being written does
not push out of memory what is being read, and the sync at the end has nothing left to wait for.

Linux alone, and not on every file system; whoever asks goes the long way where this takes nothing. Knows no formats.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final, cast

LARGE: Final = 1 << 20  # what is smaller is not worth it
GRAIN: Final = mmap.ALLOCATIONGRANULARITY  # what goes past the cache lies on multiples of it, in memory as on disk
AT_ONCE: Final = 8 << 20

# What the disk says of itself. Any other error only says that this way is closed.
OF_THE_DISK: Final = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


class PastCache:
    """A second way into a file that is open for writing already; for threads to use at once. Raises only what the disk
    has to say."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file system knows no such way."""
        if not hasattr(os, "O_DIRECT"):
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        self._file = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)

    def put(self, view: memoryview, at: int) -> int:
        """How many of the bytes, which lie on a grain here as there, were written: whole grains."""
        done, size = 0, len(view) // GRAIN * GRAIN
        while done < size:
            count = self._write(view[done : min(done + AT_ONCE, size)], at + done)
            if not count:
                break
            done += count
        return done

    def take(self, file: int, start: int, size: int, at: int) -> int:
        """The same of an open file's bytes, out of the pages that hold them."""
        size = min(size, AT_ONCE) // GRAIN * GRAIN
        try:
            # Pages that are gone by now make the write fail; nothing here touches them.
            with mmap.mmap(file, size, mmap.MAP_SHARED, mmap.PROT_READ, offset=start) as pages:
                os.posix_fadvise(file, start, 2 * size, os.POSIX_FADV_WILLNEED)
                return self._write(pages, at)
        except ValueError:  # the file is shorter than it was
            return 0
        except OSError as error:
            if error.errno in OF_THE_DISK:
                raise
            return 0

    def close(self) -> None:
        """Nothing more is written this way."""
        os.close(self._file)

    def _write(self, data: memoryview | mmap.mmap, at: int) -> int:
        try:
            return os.pwrite(self._file, data, at) // GRAIN * GRAIN
        except OSError as error:
            if error.errno in OF_THE_DISK:
                raise
            return 0


def reserve(file: int, size: int) -> None:
    """Make the file so long, with its place on the disk where the file system gives one beforehand. Raises OSError."""
    os.ftruncate(file, size)
    if (allocate := _fallocate()) is not None and allocate(file, 0, 0, size) != 0:
        number = ctypes.get_errno()
        if number in OF_THE_DISK:
            raise OSError(number, os.strerror(number))


@cache
def _fallocate() -> Callable[[int, int, int, int], int] | None:
    """Linux's own: `posix_fallocate` writes into every block where the file system does not do it."""
    try:
        found = ctypes.CDLL(None, use_errno=True).fallocate
    except (AttributeError, OSError):
        return None
    found.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return cast("Callable[[int, int, int, int], int]", found)
