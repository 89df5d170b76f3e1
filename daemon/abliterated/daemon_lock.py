"""Whether another daemon serves this home, asked before anything heavy is loaded. Knows no room."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from abliterate.contract.errors import AlreadyRunning


def refuse_if_taken(path: Path) -> None:
    """Raise AlreadyRunning, which names the holder, if somebody holds the lock. A hint: it is taken later for good."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise taken(path) from None
    except OSError:
        return
    finally:
        os.close(descriptor)


def taken(path: Path) -> AlreadyRunning:
    """The error for a home that has a daemon."""
    holder = path.with_suffix(".holder")
    who = holder.read_text().strip() if holder.exists() else "another process"
    return AlreadyRunning(
        f"{path.parent}: a daemon ({who}) serves this home already",
        remedy="Stop it, or give this one another paths.state",
    )
