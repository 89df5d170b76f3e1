"""Is a worker hung? It says nothing, and does nothing: no event, no processor time, no bytes. Pure; clock an argument.

A stage may be silent for long while it works. Does not know processes.
"""

from __future__ import annotations

from dataclasses import dataclass

IDLE_SECONDS = 900.0
SILENT_SECONDS = 6 * 3600.0
LEAST_WORK = 1.0  # in what `Handle.work_done` counts; waiting for a lock takes less in IDLE_SECONDS


@dataclass(frozen=True)
class Pulse:
    """When the worker last spoke, and when it last had done noticeably more."""

    spoke: float
    worked: float
    work: float = 0.0


def felt(pulse: Pulse, work: float | None, now: float) -> Pulse:
    """The pulse after a look at the work done so far. Where that can't be told, it counts as work."""
    if work is None or work >= pulse.work + LEAST_WORK or work < pulse.work:
        return Pulse(pulse.spoke, now, work or 0.0)
    return pulse


def hung(pulse: Pulse, now: float, *, waits: bool = False) -> str:
    """Why the worker counts as hung, or "". `waits`: it waits for its device, which may take any time."""
    if waits:
        return ""
    if now - max(pulse.spoke, pulse.worked) >= IDLE_SECONDS:
        return f"the worker did nothing for {IDLE_SECONDS / 60:.0f} minutes"
    if now - pulse.spoke >= SILENT_SECONDS:
        return f"the worker said nothing for {SILENT_SECONDS / 3600:.0f} hours"
    return ""
