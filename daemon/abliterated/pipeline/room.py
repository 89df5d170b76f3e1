"""How much memory there is, and what that means: the whole model at once, on one device or spread over several, or one
layer after the other, or with a part of it left on disk.

The rules are pure; the functions at the end alone touch the machine. Does not know models or files.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import psutil
import torch

# Of glibc's <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_C: Final = ctypes.CDLL(None) if sys.platform == "linux" else None

How = Literal["whole", "spread", "streamed", "offloaded"]

# What a loaded model needs beside its weights: activations, caches, the reader's own copies.
BESIDE: Final = 1.5
# Of the free memory, what the residual streams of a streamed pass may take; and never more than this.
STATE_SHARE: Final = 0.2
MOST_STATE: Final = 8 << 30
# A pass shorter than this is not worth reading the weights once more for.
LEAST_STATE: Final = 64 << 20


@dataclass(frozen=True)
class Placement:
    """How a model comes into memory. `device`: the number of the one that is given the prompts, and everything unless
    `shares` says how many bytes of weights each may hold; `host`: the same of the main memory, where it helps out; what
    then is left over stays on disk."""

    how: How
    device: int = 0
    shares: tuple[int, ...] = ()
    host: int = 0


def place(weights: int, free: Sequence[int], host: int, *, from_host: bool = False) -> Placement:
    """Where `weights` bytes go, with so many bytes free on each device, and in the main memory.

    Whole on the emptiest device that holds it and what goes with it; else over all of them (`from_host`: only where
    the main memory holds it too, for it is read there first); else it is streamed through the emptiest.
    """
    best = max(range(len(free)), key=lambda number: free[number])
    if weights * BESIDE <= free[best]:
        return Placement("whole", best)
    if len(free) > 1 and weights * BESIDE <= sum(free) and (not from_host or weights <= host):
        return Placement("spread", 0, tuple(int(one / BESIDE) for one in free))
    return Placement("streamed", best)


def place_offloaded(free: Sequence[int], host: int) -> Placement:
    """For a model that fits nowhere and can't be streamed: devices first, then the main memory, then the disk.

    `host` is 0 where the devices have no memory of their own.
    """
    return Placement("offloaded", 0, tuple(int(one / BESIDE) for one in free), int(host / BESIDE))


def state_limit(free: int) -> int:
    """Bytes of residual streams that may go through the layers together."""
    return max(LEAST_STATE, min(int(free * STATE_SHARE), MOST_STATE))


def keep_what_is_let_go() -> None:
    """Have the C library keep what is let go until `give_back`: taking it anew for every intermediate result costs a
    quarter of a pass. Nothing where it can't be asked."""
    choose = getattr(_C, "mallopt", None)
    if choose is not None:
        choose(_MMAP_THRESHOLD, 32 << 20)
        choose(_TRIM_THRESHOLD, 1 << 30)


def give_back() -> None:
    """Have the C library return what was let go. Nothing where it can't be asked."""
    trim = getattr(_C, "malloc_trim", None)
    if trim is not None:
        trim(0)


def free_memory(device: torch.device) -> int:
    """Bytes free on the device now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    if device.type == "mps":
        # Shared with everything else the machine does.
        wired = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return int(min(wired, psutil.virtual_memory().available))
    return int(psutil.virtual_memory().available)
