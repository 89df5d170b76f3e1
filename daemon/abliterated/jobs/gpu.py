"""The device lock: one file a device, locked with flock by the worker itself, so that it dies with its holder.

The file's content is for people; only the lock counts. Never unlinked. Does not know CUDA.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from abliterate.contract.errors import Cancelled
from abliterated.jobs.scheduler import Device

POLL_SECONDS = 0.2
CPU_LOCK = "cpu.lock"


def lock_file(locks: Path, device: str) -> Path:
    """The lock of the device a recipe asks for ("auto", "cpu", "mps", "cuda", "cuda:N")."""
    if device in ("cpu", "mps"):
        return locks / f"{device}.lock"
    uuids = gpu_uuids()
    if not uuids:
        return locks / CPU_LOCK
    index = int(device.partition(":")[2] or 0)
    return locks / f"{uuids[index] if index < len(uuids) else 'gpu'}.lock"


def devices(environ: Mapping[str, str] | None = None) -> tuple[Device, ...]:
    """What can run a job each: the GPUs nvidia-smi tells of (those CUDA_VISIBLE_DEVICES leaves), else Apple's, else
    the processor. Blocking."""
    wanted = (os.environ if environ is None else environ).get("CUDA_VISIBLE_DEVICES")
    listed = _ask("index,uuid,utilization.gpu")
    found = [
        Device(fields[1], int(fields[0]), float(fields[2]) if fields[2].isdigit() else 0.0)
        for fields in listed
        if len(fields) == 3 and fields[0].isdigit() and fields[1].startswith("GPU-")
    ]
    if wanted is not None:
        names = [name.strip() for name in wanted.split(",")]
        found = [one for one in found if str(one.index) in names or any(one.name.startswith(n) for n in names if n)]
    if not found and sys.platform == "darwin" and platform.machine() == "arm64":
        return (Device("mps"),)
    return tuple(found) or (Device("cpu"),)


def gpu_uuids() -> list[str]:
    """The GPUs' stable names, as nvidia-smi tells them; empty without one."""
    return [fields[0] for fields in _ask("uuid") if fields and fields[0].startswith("GPU-")]


def _ask(fields: str) -> list[list[str]]:
    if not shutil.which("nvidia-smi"):
        return []
    argv = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(argv, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [[field.strip() for field in line.split(",")] for line in listed.stdout.splitlines()]


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
