"""A blob put into the engine's own folder without copying it: a hard link, or a reflink where the file system has one.

Only a folder named `blobs` that holds a blob the engine showed us counts as its store; whether the engine then sees
the new blob, the caller asks the engine. Does not know HTTP. Everything here blocks: call it in a thread.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from abliterate.contract.errors import DiskError
from abliterated.files import sync_folder

_FICLONE = 0x40049409  # Linux: share the extents of another file


def blobs_folder(blob: Path | None) -> Path | None:
    """The store that holds `blob`, where we may write into it; else None."""
    if blob is None or blob.parent.name != "blobs" or not blob.is_file():
        return None
    return blob.parent if os.access(blob.parent, os.W_OK | os.X_OK) else None


def blob_path(folder: Path, digest: str) -> Path:
    """Where a blob of that digest lies."""
    return folder / digest.replace(":", "-")


def link(product: Path, digest: str, folder: Path) -> bool:
    """Make `product` the blob `digest`; False where this file system or its permissions don't let us.

    `digest` must have been computed from `product`: the engine believes a blob's name. Raises DiskError.
    """
    blob = blob_path(folder, digest)
    temporary = folder / f"{blob.name}-abliterated"  # not a blob's name: Ollama clears such leftovers away itself
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(product, temporary)
        except OSError:
            if not _reflink(product, temporary):
                return False
        temporary.chmod(0o644)
        # Ollama removes blobs no manifest names yet once they are an hour old; ours must count as new.
        os.utime(temporary)
        temporary.replace(blob)
        sync_folder(folder)
    except PermissionError:
        return False
    except OSError as error:
        raise DiskError(f"{blob}: can't be written ({error.strerror})", remedy="Check that disk") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return True


def unlink(digest: str, folder: Path) -> None:
    """Take back a link that turned out to be in the wrong place."""
    with contextlib.suppress(OSError):
        blob_path(folder, digest).unlink()


def _reflink(product: Path, target: Path) -> bool:
    try:
        import fcntl

        with product.open("rb") as source, target.open("xb") as copy:
            fcntl.ioctl(copy.fileno(), _FICLONE, source.fileno())
            os.fsync(copy.fileno())
    except (ImportError, OSError):
        with contextlib.suppress(OSError):
            target.unlink(missing_ok=True)
        return False
    return True
