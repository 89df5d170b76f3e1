"""What this machine has free: memory and its NVIDIA GPUs, as psutil and nvidia-smi tell. Does not know jobs."""

from __future__ import annotations

import csv
import subprocess
import threading
import time
from typing import Any, Final

KEPT_SECONDS: Final = 2.0
_QUERY: Final = "name,utilization.gpu,memory.used,memory.total,temperature.gpu"


class Machine:
    """Asked at most every two seconds, however many look."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: dict[str, Any] = {}
        self._when = -KEPT_SECONDS

    def view(self) -> dict[str, Any]:
        """`{"memory": {"used", "total"}, "gpus": [...]}`, bytes, shares 0 to 1, degrees Celsius; None where unknown."""
        with self._lock:
            if time.monotonic() - self._when >= KEPT_SECONDS:
                self._told = {"memory": _memory(), "gpus": _gpus()}
                self._when = time.monotonic()
            return self._told


def _memory() -> dict[str, int]:
    import psutil

    memory = psutil.virtual_memory()
    return {"used": memory.total - memory.available, "total": memory.total}


def _gpus() -> list[dict[str, Any]]:
    try:
        told = subprocess.run(
            ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=3,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_gpus(told.stdout) if told.returncode == 0 else []


def parse_gpus(text: str) -> list[dict[str, Any]]:
    """nvidia-smi's table; whatever it could not tell is None."""
    found = []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) != 5:
            continue
        busy, used, total, degrees = (_number(cell) for cell in row[1:])
        found.append(
            {
                "name": row[0],
                "busy": None if busy is None else busy / 100,
                "used": None if used is None else int(used * 2**20),
                "total": None if total is None else int(total * 2**20),
                "degrees": degrees,
            }
        )
    return found


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None
