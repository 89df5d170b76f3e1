"""The device lock: one file a device, locked with flock by the worker itself, so that it dies with its holder.

The file's content is for people; only the lock counts. Never unlinked. Does not know CUDA.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from abliterate.contract.errors import Cancelled

POLL_SECONDS = 0.2


def lock_file(locks: Path, device: str) -> Path:
    """The lock of the device a recipe asks for ("auto", "cpu", "mps", "cuda", "cuda:N")."""
    if device in ("cpu", "mps"):
        return locks / f"{device}.lock"
    uuids = gpu_uuids()
    if not uuids:
        return locks / "cpu.lock"
    index = int(device.partition(":")[2] or 0)
    return locks / f"{uuids[index] if index < len(uuids) else 'gpu'}.lock"


def gpu_uuids() -> list[str]:
    """The GPUs' stable names, as nvidia-smi tells them; empty without one."""
    if not shutil.which("nvidia-smi"):
        return []
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in listed.stdout.splitlines() if line.strip().startswith("GPU-")]


@contextmanager
def device_lock(
    path: Path, *, waiting: Callable[[str], None], cancelled: Callable[[], bool], job: str
) -> Iterator[None]:
    """Hold the device; `waiting(holder)` is told once while somebody else does. Raises Cancelled."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, mode=0o660, preserve_lock_file=True, fallback_to_soft=False)
    told = False
    while True:
        try:
            lock.acquire(timeout=POLL_SECONDS)
            break
        except Timeout:
            if not told:
                waiting(holder(path))
                told = True
            if cancelled():
                raise Cancelled("cancelled while waiting for the device") from None
    try:
        path.with_suffix(".holder").write_text(f"pid {os.getpid()} job {job}\n")
        yield
    finally:
        lock.release()


def holder(path: Path) -> str:
    """Who wrote last that it holds the lock; a hint for people, never a decision."""
    try:
        return path.with_suffix(".holder").read_text().strip()
    except OSError:
        return "somebody"
