"""What time it is, as an argument: tests bring their own. Knows nothing else."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass


def _local() -> datetime.datetime:
    return datetime.datetime.now().astimezone()


@dataclass(frozen=True)
class Clock:
    """`wall`: seconds since the epoch. `local`: the clock on the wall, for windows."""

    wall: Callable[[], float] = time.time
    local: Callable[[], datetime.datetime] = _local
