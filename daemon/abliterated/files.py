"""Writing so that a reader sees the whole file or none, also after a power cut.

Temporary name, fsync, rename, fsync of the folder. Does not know what is written.
"""

from __future__ import annotations

import os
from pathlib import Path

from abliterated.failpoints import failpoint


def write_whole(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write `data` to `path` as one step. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        failpoint("write.opened")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            failpoint("write.written")
            os.fsync(file.fileno())
        failpoint("write.synced")
        temporary.replace(path)
        failpoint("write.renamed")
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    failpoint("write.done")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of `write_whole` that a death left in `folder`; it must have no writer now."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
