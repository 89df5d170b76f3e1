"""Which job runs next, and why each of the others waits. Pure: facts in, decision out; the clock is an argument.

Does not know processes, files or the journal's storage.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass

from abliterate.contract.states import Reason, State
from abliterated.jobs.journal import Job

GPU_IDLE_SECONDS = 60.0


@dataclass(frozen=True)
class Conditions:
    """The world as the scheduler sees it. `now`: seconds since the epoch; `local`: the wall clock, for windows."""

    now: float
    local: datetime.datetime
    paused: bool = False
    slot_taken: bool = False
    idle_seconds: float = float("inf")
    ended: Mapping[str, State] | None = None


@dataclass(frozen=True)
class Waiting:
    """Why a job waits, for people."""

    job: str
    reason: Reason
    explanation: str


@dataclass(frozen=True)
class Decision:
    """`start`: the job to start now. `waiting`: the others. `look_again`: seconds until time alone may change this."""

    start: str | None
    waiting: tuple[Waiting, ...]
    look_again: float | None


def decide(jobs: list[Job], conditions: Conditions) -> Decision:
    """Choose among the queued jobs: highest priority first, then first come, first served."""
    queue = sorted(
        (job for job in jobs if job.state == "queued"), key=lambda job: (-job.recipe.schedule.priority, job.seq)
    )
    start: str | None = None
    waiting: list[Waiting] = []
    wake: list[float] = []
    unfinished = {job.label for job in jobs}
    for job in queue:
        obstacle, seconds = _obstacle(job, conditions, unfinished)
        if seconds is not None:
            wake.append(seconds)
        if obstacle is not None:
            waiting.append(obstacle)
        elif start is None and not conditions.slot_taken:
            start = job.id
        else:
            waiting.append(Waiting(job.id, "gpu-busy", "another job holds the GPU"))
    return Decision(start, tuple(waiting), min(wake, default=None))


def _obstacle(job: Job, conditions: Conditions, unfinished: set[str]) -> tuple[Waiting | None, float | None]:
    schedule = job.recipe.schedule
    if conditions.paused:
        return Waiting(job.id, "paused", "the queue is paused; `abliterate resume` lets it go on"), None
    if job.retry_at > conditions.now:
        seconds = job.retry_at - conditions.now
        reason: Reason = job.reason if job.reason in ("ollama-down", "disk", "vram") else "backoff"
        return Waiting(job.id, reason, job.explanation or f"tries again in {seconds:.0f} s"), seconds
    if schedule.not_before:
        start = datetime.datetime.fromisoformat(schedule.not_before)
        local = conditions.local if start.tzinfo is None else conditions.local.astimezone(start.tzinfo)
        start = start.replace(tzinfo=local.tzinfo) if start.tzinfo is None else start
        if local < start:
            seconds = (start - local).total_seconds()
            return Waiting(job.id, "not-before", f"not before {schedule.not_before}"), seconds
    if schedule.window and not in_window(schedule.window, conditions.local.time()):
        # The wall clock is compared at every look and never precomputed: a window survives a change of daylight time.
        return Waiting(job.id, "window", f"runs between {schedule.window.replace('-', ' and ')}"), 30.0
    for label in schedule.after:
        if label in unfinished:
            return Waiting(job.id, "dependency", f"after {label}"), None
        if (conditions.ended or {}).get(label) != "succeeded":
            return Waiting(job.id, "dependency", f"{label} has not succeeded"), None
    if schedule.when == "gpu-idle" and conditions.idle_seconds < GPU_IDLE_SECONDS:
        return Waiting(job.id, "gpu-busy", "requests are being answered"), GPU_IDLE_SECONDS - conditions.idle_seconds
    return None, None


def in_window(window: str, clock: datetime.time) -> bool:
    """Whether `clock` lies in "HH:MM-HH:MM"; a window may pass midnight."""
    begin, end = (datetime.time.fromisoformat(part) for part in window.split("-"))
    clock = clock.replace(second=0, microsecond=0, tzinfo=None)
    return begin <= clock < end if begin <= end else clock >= begin or clock < end
