"""Is there room for a job? What it needs on each filesystem and in memory, against what is free there.

`lacking` is pure; `needs` looks at files. The pipeline asks again before each stage. Does not know the queue.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from abliterate.contract.messages import Task

MARGIN = 1.1
LEAST_MEMORY = 768 * 1024**2  # torch, transformers and one tensor of an ordinary model


@dataclass(frozen=True)
class Need:
    """Bytes wanted on a filesystem (its device number), and for what."""

    filesystem: int
    bytes: int
    what: str


@dataclass(frozen=True)
class Room:
    """What a filesystem has free, and where one finds it."""

    free: int
    place: str


def needs(task: Task, store: Path | None = None) -> tuple[Need, ...]:
    """What the job will still write: the product, and the engine's copy where that can't be a link. Blocking."""
    source = size_of(Path(task.source)) if task.source else 0
    if not source or task.recipe.export.format in ("adapter", "direction"):
        return ()
    output = Path(task.output)
    written = sum(size_of(Path(folder)) for folder in (task.output, task.work))
    here = output.stat().st_dev
    found = [Need(here, max(0, int(source * MARGIN) - written), "the product")]
    if store is not None and store.is_dir() and task.recipe.export.register:
        there = store.stat().st_dev
        if there != here or not os.access(store, os.W_OK):
            found.append(Need(there, source, "the engine's copy"))
    return tuple(found)


def rooms(places: Iterable[Path]) -> dict[int, Room]:
    """What is free on the filesystems of these places. Blocking."""
    found: dict[int, Room] = {}
    for place in places:
        status = os.statvfs(place)
        found[place.stat().st_dev] = Room(status.f_bavail * status.f_frsize, str(place))
    return found


def free_memory() -> int:
    """Bytes of main memory that can be had."""
    return int(psutil.virtual_memory().available)


def lacking(wanted: Iterable[Need], others: Iterable[Need], free: Mapping[int, Room]) -> str:
    """Where room is short, or "". `others`: what the jobs at work were promised and may not have written yet."""
    promised: dict[int, int] = {}
    for need in others:
        promised[need.filesystem] = promised.get(need.filesystem, 0) + need.bytes
    sums: dict[int, tuple[int, list[str]]] = {}
    for need in wanted:
        bytes_, what = sums.get(need.filesystem, (0, []))
        sums[need.filesystem] = (bytes_ + need.bytes, [*what, need.what])
    for filesystem, (bytes_, what) in sums.items():
        room = free.get(filesystem)
        if room is not None and bytes_ > room.free - promised.get(filesystem, 0):
            taken = f", {_told(promised[filesystem])} of it promised to other jobs" if filesystem in promised else ""
            return f"{room.place}: {' and '.join(what)} need {_told(bytes_)}, {_told(room.free)} are free{taken}"
    return ""


def size_of(path: Path) -> int:
    """Bytes below `path`, links followed for the path itself only."""
    if path.is_file():
        return path.stat().st_size
    return sum(
        (Path(folder) / name).stat().st_size
        for folder, _, names in os.walk(path)
        for name in names
        if (Path(folder) / name).is_file()
    )


def identity(task: Task) -> str:
    """What the job works on, so that the same bytes are known again: a digest, or size and time of each file."""
    if task.base_digest:
        return task.base_digest
    path = Path(task.source) if task.source else None
    if path is None or not path.exists():
        return ""
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    marks = [f"{one.name}:{one.stat().st_size}:{one.stat().st_mtime_ns}" for one in files[:1000]]
    return f"{path}|{'|'.join(marks)}"


def _told(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
