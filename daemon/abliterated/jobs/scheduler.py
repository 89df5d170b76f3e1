"""Which jobs start now, and why each of the others waits. Pure: facts in, decision out; the clock is an argument.

One job a device; a job whose model must be fetched first may do that while another holds the device. Times of day are
compared on the wall clock at every look and never precomputed, so that they survive daylight time, a set clock and a
suspended machine. Does not know processes, files or the journal's storage.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from abliterate.contract.states import Reason, State
from abliterated.jobs.journal import Job

GPU_IDLE_SECONDS = 60.0
GPU_IDLE_PERCENT = 10.0
# No wait is longer: a clock may be set, a machine suspended, a GPU freed by a stranger.
LOOK_AGAIN = 60.0
WINDOW_LOOK = 30.0
FETCHES_AT_ONCE = 2
# What a job that is tried again waits for; anything else is told as "backoff".
TOLD: frozenset[Reason] = frozenset({"ollama-down", "cluster-down", "disk", "vram", "memory"})


@dataclass(frozen=True)
class Device:
    """What can run one job at a time. `name`: as its lock; `index`: of `cuda:N`; `used`: how busy strangers keep it,
    in percent, where that is known."""

    name: str
    index: int = 0
    used: float = 0.0


@dataclass(frozen=True)
class Active:
    """A job that has a worker. `fetching`: it needs its device only later; `waits`: it has fetched, and waits."""

    job: str
    device: str
    fetching: bool = False
    waits: bool = False


@dataclass(frozen=True)
class EngineAway:
    """The engine did not answer last time: one job asks again in `ask_in` seconds, the others wait for its answer."""

    explanation: str
    ask_in: float


@dataclass(frozen=True)
class Conditions:
    """The world as the scheduler sees it. `now`: seconds since the epoch; `local`: the wall clock, for windows."""

    now: float
    local: datetime.datetime
    paused: bool = False
    draining: bool = False
    active: Sequence[Active] = ()
    devices: Sequence[Device] = (Device("cpu"),)
    idle_seconds: float = float("inf")
    engine: EngineAway | None = None
    ended: Mapping[str, State] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """A job to start, and the device it gets."""

    job: str
    device: Device


@dataclass(frozen=True)
class Waiting:
    """Why a job waits, for people."""

    job: str
    reason: Reason
    explanation: str


@dataclass(frozen=True)
class Decision:
    """`start`: jobs to start now. `waiting`: the others. `look_again`: seconds until time alone may change this."""

    start: tuple[Start, ...]
    waiting: tuple[Waiting, ...]
    look_again: float | None


def decide(jobs: Sequence[Job], conditions: Conditions) -> Decision:
    """Choose among the queued jobs: highest priority first, then first come, first served."""
    at_work = {active.job for active in conditions.active}
    queue = sorted(
        (job for job in jobs if job.state == "queued" and job.id not in at_work),
        key=lambda job: (-job.recipe.schedule.priority, job.seq),
    )
    active = list(conditions.active)
    unfinished = {job.label for job in jobs}
    start: list[Start] = []
    waiting: list[Waiting] = []
    wake: list[float] = []
    asked = any(job.id in at_work and needs_engine(job) for job in jobs)
    for job in queue:
        obstacle, seconds = _obstacle(job, conditions, unfinished)
        if obstacle is None and conditions.engine is not None and needs_engine(job):
            if asked or conditions.engine.ask_in > 0:
                obstacle = Waiting(job.id, "ollama-down", conditions.engine.explanation)
                seconds = None if asked else conditions.engine.ask_in
            asked = True
        if obstacle is None:
            device = _device(job, conditions.devices, active)
            if device is not None:
                start.append(Start(job.id, device))
                active.append(Active(job.id, device.name, fetches(job)))
                continue
            obstacle, seconds = _no_device(job, conditions, active, queue), None
        waiting.append(obstacle)
        if seconds is not None:
            wake.append(min(seconds, LOOK_AGAIN))
    return Decision(tuple(start), tuple(waiting), min(wake, default=None))


def needs_engine(job: Job) -> bool:
    """Whether the job can't begin without the engine's answer."""
    return job.recipe.model.startswith("ollama:")


def fetches(job: Job) -> bool:
    """Whether the job's first stage needs the network and no device."""
    return job.recipe.model.startswith("hf:")


def _obstacle(job: Job, conditions: Conditions, unfinished: set[str]) -> tuple[Waiting | None, float | None]:
    """What stands in the job's way beside the devices, and after how many seconds time alone may remove it."""
    schedule = job.recipe.schedule
    if conditions.draining:
        return Waiting(job.id, "drain", "the queue is drained; `abliterate resume` lets it go on"), None
    if conditions.paused:
        return Waiting(job.id, "paused", "the queue is paused; `abliterate resume` lets it go on"), None
    if job.retry_at > conditions.now:
        seconds = job.retry_at - conditions.now
        reason: Reason = job.reason if job.reason in TOLD else "backoff"
        return Waiting(job.id, reason, job.explanation or f"tries again in {seconds:.0f} s"), seconds
    if schedule.not_before and (seconds := _until(schedule.not_before, conditions.local)) > 0:
        return Waiting(job.id, "not-before", f"not before {schedule.not_before}"), seconds
    if schedule.window and not in_window(schedule.window, conditions.local.time()):
        return Waiting(job.id, "window", f"runs between {schedule.window.replace('-', ' and ')}"), WINDOW_LOOK
    for label in schedule.after:
        if label in unfinished and label != job.label:
            return Waiting(job.id, "dependency", f"after {label}"), None
        if (ended := conditions.ended.get(label)) != "succeeded":
            told = f"{label} has {ended}: `abliterate retry` it" if ended else f"no job is called {label} yet"
            return Waiting(job.id, "dependency", told.replace("has cancelled", "was cancelled")), None
    if schedule.when == "gpu-idle" and conditions.idle_seconds < GPU_IDLE_SECONDS:
        return Waiting(job.id, "gpu-busy", "requests are being answered"), GPU_IDLE_SECONDS - conditions.idle_seconds
    if schedule.when == "gpu-idle" and not any(_idle(device) for device in _fitting(job, conditions.devices)):
        return Waiting(job.id, "gpu-busy", "another program uses the GPU"), WINDOW_LOOK
    return None, None


def _device(job: Job, devices: Sequence[Device], active: Sequence[Active]) -> Device | None:
    """The device the job may have now: a free one, or a taken one while there is something to fetch first."""
    held = {one.device for one in active if not one.fetching}
    fitting = [one for one in _fitting(job, devices) if job.recipe.schedule.when == "any" or _idle(one)]
    free = [device for device in fitting if device.name not in held]
    # One that fetches will want its device too: prefer those nobody waits for.
    free.sort(key=lambda device: sum(one.device == device.name for one in active))
    if not fetches(job):
        return free[0] if free else None
    if sum(one.fetching or one.waits for one in active) >= FETCHES_AT_ONCE:
        return None
    return next(iter(free or fitting), None)


def _fitting(job: Job, devices: Sequence[Device]) -> list[Device]:
    """The devices the recipe's `run.device` may mean. "auto" is a GPU where there is one."""
    kind, _, index = job.recipe.run.device.partition(":")
    if kind in ("cpu", "mps"):
        return [next((device for device in devices if device.name == kind), Device(kind))]
    gpus = [device for device in devices if device.name not in ("cpu", "mps")]
    if not gpus:
        return [next(iter(devices), Device("cpu"))]
    if not index:
        return gpus
    return [device for device in gpus if device.index == int(index)] or [Device(f"cuda-{index}", int(index))]


def _idle(device: Device) -> bool:
    return device.used < GPU_IDLE_PERCENT


def _no_device(job: Job, conditions: Conditions, active: Sequence[Active], queue: Sequence[Job]) -> Waiting:
    fitting = {device.name for device in _fitting(job, conditions.devices)}
    holder = next((one.job for one in active if one.device in fitting and not one.fetching), "")
    if fetches(job) and not holder:
        return Waiting(job.id, "gpu-busy", "other jobs are fetching their models")
    above = next((one for one in queue if one.id == holder), None)
    if above is not None and above.recipe.schedule.priority > job.recipe.schedule.priority:
        return Waiting(job.id, "priority", f"job {holder[-6:]} has a higher priority")
    return Waiting(job.id, "gpu-busy", f"job {holder[-6:]} holds the device" if holder else "its device is taken")


def _until(not_before: str, local: datetime.datetime) -> float:
    """Seconds until then. Without a zone it is a time on the wall, whatever daylight time makes of it."""
    start = datetime.datetime.fromisoformat(not_before)
    now = local.replace(tzinfo=None) if start.tzinfo is None else local
    return (start - now).total_seconds()


def in_window(window: str, clock: datetime.time) -> bool:
    """Whether `clock` lies in "HH:MM-HH:MM"; a window may pass midnight; one that ends as it begins is always open."""
    begin, end = (datetime.time.fromisoformat(part) for part in window.split("-"))
    clock = clock.replace(second=0, microsecond=0, tzinfo=None)
    return begin <= clock < end if begin < end else clock >= begin or clock < end
