"""Long reading and hashing in threads that step back: the daemon's loop, which relays tokens meanwhile, comes first.

Only Linux gives a thread a priority of its own. Does not know what is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
NICE = 15


def _step_back() -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


_threads = ThreadPoolExecutor(2, "aside", _step_back)


async def aside(function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """As `asyncio.to_thread`, but behind all else."""
    return await asyncio.get_running_loop().run_in_executor(_threads, lambda: function(*arguments, **named))


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Its answer or error; a caller who is cancelled meanwhile gets the CancelledError only when it has ended."""
    task = asyncio.create_task(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        with contextlib.suppress(Exception):
            task.result()
        raise asyncio.CancelledError
    return task.result()
