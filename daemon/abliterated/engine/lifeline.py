"""Ending with the process that started us, however it ended.

On Linux the kernel sends SIGKILL (PDEATHSIG); everywhere a pipe whose write end the parent holds says so by its end
of file.
Does not know what is ended.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill us when `parent` (our parent when it started us) dies; ends at once where it already has.

    The signal follows the *thread* that started us: a parent must start us from a thread that lives as long as it does.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def end_at_eof(descriptor: int) -> None:
    """End this process as soon as the pipe's write end is closed; a daemon thread waits for that."""

    def wait() -> None:
        try:
            while os.read(descriptor, 4096):
                pass
        except OSError:
            pass  # an unreadable lifeline is a cut one
        os._exit(0)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
