"""A file that ends while it is mapped into memory: the kernel sends a signal where a read would have had an error.

For foreground verbs: the process still ends, but with a sentence and an exit code. A job's worker needs none of this:
the queue knows what the signal means. Knows no verb.
"""

from __future__ import annotations

import ctypes
import os
import signal
from contextlib import suppress
from typing import Any

from abliterate.contract.errors import ModelError

_SAID = b"""\
abliterated: a file of the model was cut short while it was read
  \xe2\x86\x92 Pull or download the model again, and let nothing write to it meanwhile
"""
_kept: list[Any] = []  # the handler must not be collected


def name_cut_files() -> None:
    """From now on SIGBUS is told and ends the process with ModelError's exit code.

    Python's own handlers run when the interpreter goes on, and behind such a signal it never does: this one is C's.
    """
    if not hasattr(signal, "SIGBUS"):
        return

    def told(_: int) -> None:
        os.write(2, _SAID)
        os._exit(ModelError.exit_code)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(told)
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).signal(int(signal.SIGBUS), handler)
        _kept.append(handler)
