"""When is a file complete? Accept fast, reject slowly. Pure: sightings in, verdict out; the clock is an argument.

A file that reads as a recipe and that nobody writes any more, as the kernel says, is accepted at once; where the kernel
doesn't say, after QUIET seconds without a change. While somebody has it open for writing, and while it doesn't read as
a recipe, it is given PATIENCE seconds of quiet: editors save halves, networks copy chunks, and half a recipe may read
as a whole one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

QUIET = 1.0
PATIENCE = 5.0
AGAIN = 0.25
IGNORED_PREFIXES = (".", "_", "#", "~")
IGNORED_SUFFIXES = ("~", ".swp", ".swx", ".tmp", ".part", ".crdownload")


@dataclass(frozen=True)
class Sighting:
    """What one look at a file told. `since`: when this very state of it was first seen (monotonic seconds).

    `writer_gone`: None where the kernel doesn't say.
    """

    since: float
    writer_gone: bool | None
    good: bool


Verdict = Literal["accept", "reject", "wait"]


def concerns(name: str) -> bool:
    """Whether a file of that name may be a recipe at all."""
    return name.endswith(".toml") and not name.startswith(IGNORED_PREFIXES) and not name.endswith(IGNORED_SUFFIXES)


def settle(seen: Sighting, now: float) -> tuple[Verdict, float]:
    """The verdict, and for "wait" the seconds after which to look again."""
    quiet = now - seen.since
    if seen.good and seen.writer_gone is not False:
        return ("accept", 0.0) if seen.writer_gone or quiet >= QUIET else ("wait", QUIET - quiet)
    if seen.good:
        # The close of the file rings; should that be lost, it is looked at again.
        return ("accept", 0.0) if quiet >= PATIENCE else ("wait", min(AGAIN, PATIENCE - quiet))
    return ("reject", 0.0) if quiet >= PATIENCE else ("wait", PATIENCE - quiet)
