"""A file that takes up room while there is room, so that the journal can say what happened when there is none.

Does not know the journal.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

SIZE = 1024 * 1024
ROOM_TO_FILL = 64 * SIZE


class Spare:
    """`give()` frees its megabyte once; `fill()` takes it back when there is room again."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def fill(self) -> None:
        """Have the spare file, unless the disk is nearly full."""
        with contextlib.suppress(OSError):
            if self._path.exists() and self._path.stat().st_size == SIZE:
                return
            found = os.statvfs(self._path.parent)
            if found.f_bavail * found.f_frsize < ROOM_TO_FILL:
                return
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o640)
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(descriptor, 0, SIZE)
                else:
                    os.write(descriptor, bytes(SIZE))
            finally:
                os.close(descriptor)

    def give(self) -> bool:
        """Free the room; False where it was free already."""
        try:
            self._path.unlink()
        except OSError:
            return False
        return True
