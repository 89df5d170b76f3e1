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
    "disk",
    "ollama-down",
    "backoff",
    "interrupted",
    "dependency",
    "priority",
    "paused",
    "user",
    "crash-loop",
    "requeue-limit",
]

STATES: Final[tuple[State, ...]] = get_args(State)
TERMINAL: Final[frozenset[State]] = frozenset({"succeeded", "cancelled", "failed", "rejected"})

TRANSITIONS: Final = MappingProxyType[State, frozenset[State]](
    {
        "queued": frozenset({"starting", "held", "cancelled", "failed"}),
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


class IllegalTransition(Exception):
    """A move the table does not have: a bug of ours, never the user's."""


def check_transition(old: State, new: State) -> None:
    """Raise IllegalTransition unless the table has the move."""
    if new not in TRANSITIONS[old]:
        raise IllegalTransition(f"no job goes from {old} to {new}")
