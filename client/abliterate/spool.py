"""Submitting by the folder alone: a recipe that appears whole in the in-tray, or not at all.

Knows the spool's layout; does not know recipes, nor whether a daemon runs.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from abliterate.contract.errors import DaemonUnavailable, DiskError
from abliterate.contract.ids import slug
from abliterate.contract.paths import Home


def drop(home: Home, job: str, label: str, recipe: bytes) -> Path:
    """Put `recipe` into the in-tray under the id `job`; it is on disk when this returns."""
    folder = home.incoming
    temporary, final = folder / f".{job}.tmp", folder / f"{job}.{slug(label)}.toml"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            _write(temporary, recipe)
            temporary.rename(final)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskError(f"{folder}: no room for the recipe", remedy="Make room and submit it again") from error
        raise DaemonUnavailable(
            f"the daemon is down, and its in-tray {folder} can't be written ({error.strerror})",
            remedy="Start the daemon, or name its configuration with --config",
        ) from error
    return final


def _write(path: Path, content: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o640), "wb") as file:
        # Whatever the umask: a daemon of another user reads it by the folder's group.
        os.fchmod(file.fileno(), 0o640)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
