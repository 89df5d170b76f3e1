"""Named places where a test may let this process die or fail. Free of cost where none is armed.

ABLITERATED_FAILPOINTS="name=action,name@3=action": at that name (its third time), `kill` ends the process as a power
cut would, `exit` leaves it, `enospc`, `eio` raise OSError, `trace:FILE` notes every name reached (as `*=trace:FILE`).
Read once, at the first use; a service never sets it. Knows no room.
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter
from collections.abc import Callable

VARIABLE = "ABLITERATED_FAILPOINTS"


def failpoint(name: str) -> None:
    """Do what is armed at `name`."""
    if _ARMED:
        _reached(name)


def arm(text: str) -> None:
    """Arm what `text` says, instead of what was armed; "" disarms."""
    _COUNTS.clear()
    _ARMED.clear()
    for part in filter(None, text.split(",")):
        where, _, action = part.partition("=")
        name, _, time = where.partition("@")
        _ARMED[(name, int(time or 1) if name != "*" else 0)] = action


def hook(act: Callable[[str], None] | None) -> None:
    """Call `act` with every name reached from now on, for tests inside one process."""
    _HOOK[:] = [act] if act else []
    _ARMED.pop(("*", 0), None)
    if act:
        _ARMED[("*", 0)] = "hook"


def _reached(name: str) -> None:
    for act in _HOOK:
        act(name)
    _COUNTS[name] += 1
    if (everywhere := _ARMED.get(("*", 0), "")).startswith("trace:"):
        descriptor = os.open(everywhere.removeprefix("trace:"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(descriptor, f"{name}\n".encode())
        os.close(descriptor)
    match _ARMED.get((name, _COUNTS[name])):
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(85)
        case "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        case "eio":
            raise OSError(errno.EIO, os.strerror(errno.EIO), name)
        case _:
            pass


_ARMED: dict[tuple[str, int], str] = {}
_COUNTS: Counter[str] = Counter()
_HOOK: list[Callable[[str], None]] = []
arm(os.environ.get(VARIABLE, ""))
