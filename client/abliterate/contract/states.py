"""Theory of operation: the states of a job, why it waits, and every legal move, in one table.

A recipe that is read becomes a job in `queued`. When nothing stands in its way it goes to `starting` (a worker is being
started), `running` (the worker works, stage by stage), then `registering` (the worker is gone, the GPU free, the daemon
hands the product to Ollama) and `succeeded`. Whatever interrupts a running job sends it back to `queued` with the
reason; what can't get better ends in `failed`.
Illegal moves raise and change nothing. Does not know the journal that stores the states.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final, Literal, get_args

State = Literal[
    "queued", "held", "starting", "running", "registering", "cancelling", "succeeded", "cancelled", "failed", "rejected"
]
Stage = Literal["fetch", "load", "direction", "search", "edit", "evaluate", "report", "register"]
Reason = Literal[
    "",
    "ready",
    "window",
    "not-before",
    "gpu-busy",
    "vram",
    "memory",
    "disk",
    "ollama-down",
    "cluster-down",
    "backoff",
    "interrupted",
    "dependency",
    "priority",
    "paused",
    "drain",
    "user",
    "crash-loop",
    "requeue-limit",
    "duplicate",
]

STATES: Final[tuple[State, ...]] = get_args(State)
TERMINAL: Final[frozenset[State]] = frozenset({"succeeded", "cancelled", "failed", "rejected"})

TRANSITIONS: Final = MappingProxyType[State, frozenset[State]](
    {
        "queued": frozenset({"starting", "held", "cancelled", "failed", "succeeded"}),
        "held": frozenset({"queued", "cancelled"}),
        "starting": frozenset({"running", "queued", "held", "cancelling", "failed"}),
        "running": frozenset({"registering", "succeeded", "queued", "held", "cancelling", "failed"}),
        "registering": frozenset({"succeeded", "failed", "queued", "cancelling"}),
        "cancelling": frozenset({"cancelled", "succeeded"}),
        "succeeded": frozenset(),
        "cancelled": frozenset({"queued"}),
        "failed": frozenset({"queued"}),
        "rejected": frozenset(),
    }
)

MEANING: Final = MappingProxyType[State, str](
    {
        "queued": "waits; the reason says for what",
        "held": "waits for a person: one held it, or it crashed twice at one stage, or had too many attempts",
        "starting": "a worker is being started",
        "running": "the worker works; the stage says on what",
        "registering": "the worker is gone, the device free; the product is handed to the engine",
        "cancelling": "is being stopped",
        "succeeded": "ended: the product is where it was asked for",
        "cancelled": "ended: by a person",
        "failed": "ended: what waiting can't mend",
        "rejected": "never became a job: see `spool/rejected`",
    }
)
WHY: Final = MappingProxyType[Reason, str](
    {
        "ready": "nothing stands in its way",
        "window": "outside `schedule.window`",
        "not-before": "before `schedule.not_before`",
        "gpu-busy": "its device is taken, or `schedule.when` asks for an idle one",
        "vram": "the device had too little memory; tried again",
        "memory": "too little main memory is free",
        "disk": "too little room on one of the filesystems it needs",
        "ollama-down": "the engine doesn't answer; goes on at its first answer",
        "cluster-down": "the Ray cluster doesn't answer; asked again every half minute",
        "backoff": "failed in a way that may pass; tried again",
        "interrupted": "lost its worker; goes on at the stage it lost",
        "dependency": "a recipe of `schedule.after` has not succeeded",
        "priority": "another job of a higher priority goes first",
        "paused": "`abliterate pause`",
        "drain": "`abliterate drain`",
        "user": "held by a person, or by `schedule.hold`",
        "crash-loop": "its worker died twice at the same stage",
        "requeue-limit": "more attempts than `jobs.retries`",
        "duplicate": "the same recipe on the same base had succeeded; `force = true` runs it again",
    }
)


class IllegalTransition(Exception):
    """A move the table does not have: a bug of ours, never the user's."""


def check_transition(old: State, new: State) -> None:
    """Raise IllegalTransition unless the table has the move."""
    if new not in TRANSITIONS[old]:
        raise IllegalTransition(f"no job goes from {old} to {new}")
