"""What runs a worker, seen from the queue: start it, hear it to its end, stop it. Does not know where it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from abliterate.contract.messages import Failure, Progress, Result, Task
from abliterated.jobs.scheduler import Device


class Handle(Protocol):
    """One worker. `word`: its last; `mark`: what finds it again after the daemon's death."""

    word: Result | Failure | None

    @property
    def mark(self) -> str: ...

    async def follow(self, tell: Callable[[Progress], None]) -> int:
        """Hear it to its end; its exit status (negative: the signal)."""

    async def stop(self, patience: float = 10.0) -> None:
        """Ask it to end; after `patience` seconds make it."""

    def work_done(self) -> float | None:
        """Seconds of processor time and bytes moved so far, in one growing number; None where that can't be told."""


class Executor(Protocol):
    """Where workers run. `here`: on this machine, whose memory they need."""

    here: bool

    async def start(self, task: Task, folder: Path, device: Device) -> Handle:
        """Start a worker. Raises DiskError, EngineUnavailable where nobody can run it now."""

    def end_orphan(self, mark: str) -> bool:
        """End a worker that an earlier daemon left behind; whether it was still there. Blocking."""
