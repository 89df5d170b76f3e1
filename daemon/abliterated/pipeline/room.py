"""How much memory there is, and what that means: the whole model at once, or one layer after the other.

The rules are pure; the functions at the end alone touch the machine. Does not know models or files.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Final, Literal

import psutil
import torch

# Of glibc's <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_C: Final = ctypes.CDLL(None) if sys.platform == "linux" else None

How = Literal["whole", "streamed"]

# What a loaded model needs beside its weights: activations, caches, the reader's own copies.
BESIDE: Final = 1.5
# Of the free memory, what the residual streams of a streamed pass may take; and never more than this.
STATE_SHARE: Final = 0.2
MOST_STATE: Final = 8 << 30
# A pass shorter than this is not worth reading the weights once more for.
LEAST_STATE: Final = 64 << 20


def how_to_load(parameters: int, bytes_each: int, free: int) -> How:
    """Whole where the weights and what goes with them fit into `free` bytes; streamed where they don't."""
    return "whole" if parameters * bytes_each * BESIDE <= free else "streamed"


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
