"""One file of the in-tray: read it without trusting it, remove it. Everything relative to the folder's descriptor.

A link, a FIFO, a socket, a device, a hard link, a stranger's or a world-writable file is never followed. Does not know
recipes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import signal
import stat
from dataclasses import dataclass
from pathlib import Path

from abliterate.contract.errors import RecipeError
from abliterate.contract.toml_source import MAX_BYTES
from abliterated.failpoints import failpoint


@dataclass(frozen=True)
class Entry:
    """A regular file as it was read. `key` names these very bytes in this very file."""

    name: str
    data: bytes
    key: str
    writer_gone: bool | None


class Refused(RecipeError):
    """An entry that must not be read: not a plain file of somebody we know."""


def read_entry(folder: int, name: str, owners: frozenset[int]) -> Entry | None:
    """Read `name`; None if it went away or changed while being read. Raises Refused for what must not be read."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise Refused(f"{name}: a symbolic link", remedy="Put the recipe itself there") from None
        raise Refused(f"{name}: can't be opened ({error.strerror})", remedy="Check what it is") from None
    try:
        before = os.fstat(descriptor)
        _check(name, before, owners)
        data = os.read(descriptor, MAX_BYTES + 1)
        gone = _writer_gone(descriptor)
        after = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or len(data) != after.st_size:
        return None
    digest = hashlib.sha256(data).hexdigest()
    return Entry(name, data, f"{after.st_dev}:{after.st_ino}:{after.st_mtime_ns}:{digest}", gone)


def remove_entry(folder: int, entry: Entry) -> None:
    """Unlink the file if the name still means it; a newer file of that name stays."""
    with contextlib.suppress(FileNotFoundError):
        now = os.stat(entry.name, dir_fd=folder, follow_symlinks=False)
        if entry.key.startswith(f"{now.st_dev}:{now.st_ino}:"):
            os.unlink(entry.name, dir_fd=folder)
            failpoint("claim.unlinked")
            os.fsync(folder)
            failpoint("claim.unlink-synced")


def known_owners() -> frozenset[int]:
    """Whose files are read: root's and our own."""
    return frozenset({0, os.geteuid()})


def folder_descriptor(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _check(name: str, status: os.stat_result, owners: frozenset[int]) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise Refused(f"{name}: not a plain file", remedy="Put the recipe itself there")
    if status.st_nlink != 1:
        raise Refused(f"{name}: has another name elsewhere (hard link)", remedy="Copy the recipe there instead")
    if status.st_uid not in owners and not _same_group(status):
        raise Refused(f"{name}: belongs to user {status.st_uid}", remedy="Submit it with `abliterate submit`")
    if status.st_mode & stat.S_IWOTH:
        raise Refused(f"{name}: anybody may write to it", remedy="chmod o-w it")
    if status.st_size > MAX_BYTES:
        raise Refused(f"{name}: {status.st_size} bytes are too many", remedy=f"Keep it under {MAX_BYTES} bytes")


def _same_group(status: os.stat_result) -> bool:
    return status.st_gid != 0 and status.st_gid in {os.getegid(), *os.getgroups()} and os.getegid() != 0


def _writer_gone(descriptor: int) -> bool | None:
    """Whether nobody has the file open for writing: Linux grants a read lease only then. None where it doesn't say."""
    if not hasattr(fcntl, "F_SETLEASE"):
        return None
    try:
        # A writer that comes in this moment breaks the lease by a signal: one that is ignored unless asked for.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) and _may_lease(descriptor) else None
    return True


def _may_lease(descriptor: int) -> bool:
    return os.geteuid() in (0, os.fstat(descriptor).st_uid)
