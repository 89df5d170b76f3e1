"""Of others on the machine: whether a process has ended, how much of the processor is left, to be nobody."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import psutil

NOBODY = 65534


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's rights over files; who has none anyway stays who he is."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if before == 0:
            os.seteuid(before)


def gone(pid: int) -> bool:
    """Whether that process has ended, waited for by its parent or not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def crowding(seconds: float = 0.05) -> float:
    """How many times as long as alone a program takes now: 1.0 on a quiet machine."""
    begun, used = time.monotonic(), time.thread_time()
    while time.thread_time() - used < seconds:
        pass
    return max(1.0, (time.monotonic() - begun) / seconds)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """What is done inside takes no longer; where others share the machine, as much longer as they make it."""
    before, begun = crowding(), time.monotonic()
    yield
    took = time.monotonic() - begun
    allowed = seconds * max(before, crowding())
    assert took < allowed, f"{took:.2f} s, not {allowed:.2f}"
