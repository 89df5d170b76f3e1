"""When is a file complete? Accept fast, reject slowly. Pure: sightings in, verdict out; the clock is an argument.

A file nobody writes any more (the kernel says so, or it has not changed for QUIET seconds) that reads as a recipe is
accepted at once. One that doesn't is given PATIENCE seconds of quiet first: editors save halves, networks copy chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

QUIET = 0.25
PATIENCE = 5.0
IGNORED_PREFIXES = (".", "_", "#", "~")
IGNORED_SUFFIXES = ("~", ".swp", ".swx", ".tmp", ".part", ".crdownload")


@dataclass(frozen=True)
class Sighting:
    """What one look at a file told. `since`: when this very state of it was first seen (monotonic seconds)."""

    since: float
    writer_gone: bool
    good: bool


Verdict = Literal["accept", "reject", "wait"]


def concerns(name: str) -> bool:
    """Whether a file of that name may be a recipe at all."""
    return name.endswith(".toml") and not name.startswith(IGNORED_PREFIXES) and not name.endswith(IGNORED_SUFFIXES)


def settle(seen: Sighting, now: float) -> tuple[Verdict, float]:
    """The verdict, and for "wait" the seconds after which to look again."""
    quiet = now - seen.since
    if seen.good:
        return ("accept", 0.0) if seen.writer_gone or quiet >= QUIET else ("wait", QUIET - quiet)
    return ("reject", 0.0) if quiet >= PATIENCE else ("wait", PATIENCE - quiet)
