"""What a worker's end means for its job. Pure: how it ended in, the next move out.

Does not know processes; `jobs/runner.py` tells it what happened.
"""

from __future__ import annotations

import hashlib
import signal
from dataclasses import dataclass

from abliterate.contract.errors import AbliteratedError, EngineUnavailable, FailureClass
from abliterate.contract.messages import Failure, Result
from abliterate.contract.states import Reason, State

FIRST_BACKOFF = 30.0
LONGEST_BACKOFF = 3600.0
CRASHES_ALLOWED = 2
# What waiting may mend: the reason it waits with, and the first wait in seconds. The others end the job.
TRANSIENT: dict[FailureClass, tuple[Reason, float]] = {
    "disk": ("disk", 60.0),
    "oom-gpu": ("vram", 60.0),
    "oom-host": ("memory", 120.0),
    "timeout": ("backoff", FIRST_BACKOFF),
    "ollama": ("ollama-down", FIRST_BACKOFF),
}


@dataclass(frozen=True)
class Ended:
    """How a worker ended: exit status (negative: killed by that signal) and the last word it sent."""

    status: int
    word: Result | Failure | None
    stopping: bool = False
    cancelled: bool = False
    hung: str = ""
    stage: str = ""


@dataclass(frozen=True)
class Move:
    """The next transition, and what it changes."""

    state: State
    reason: Reason = ""
    explanation: str = ""
    failure: Failure | None = None
    retry_in: float = 0.0
    attempts: int = 0
    crashes: int = 0
    stage: str = ""
    result: Result | None = None


def after_worker(
    ended: Ended, *, registers: bool, attempts: int, crashes: int, retries: int, crashed_at: str = ""
) -> Move:
    """The move after a worker's end. `attempts` and `crashes` count the earlier ones, the latter at `crashed_at`."""
    if ended.cancelled:
        return Move("cancelled", attempts=attempts, crashes=crashes)
    if ended.status == 0 and isinstance(ended.word, Result):
        return Move("registering" if registers else "succeeded", attempts=attempts + 1, crashes=0)
    if ended.stopping or ended.status == 86:
        told = "interrupted; goes on where it was"
        return Move("queued", "interrupted", told, attempts=attempts, crashes=crashes, stage=crashed_at)
    if isinstance(ended.word, Failure) and ended.status >= 0:
        return after_failure(ended.word, attempts=attempts, crashes=crashes, retries=retries)
    if ended.status == -getattr(signal, "SIGBUS", 0) != 0:
        # A file in memory that has become shorter, or a disk that can't give it: no crash of ours.
        failure = Failure(
            failure="model",
            message="a file the worker was reading was cut short, or its disk failed (SIGBUS)",
            remedy="Pull or download the model again, look at its disk, then `abliterate retry`",
        )
        return after_failure(failure, attempts=attempts, crashes=crashes, retries=retries)
    if ended.hung:
        failure = Failure(failure="timeout", message=ended.hung, remedy="See its log; `abliterate retry` tries again")
        return after_failure(failure, attempts=attempts, crashes=crashes, retries=retries)
    # Twice at the same stage is a loop; elsewhere it got further.
    crashes = crashes + 1 if ended.stage == crashed_at else 1
    cause = f"killed by signal {-ended.status}" if ended.status < 0 else f"ended with {ended.status} and no result"
    failure = Failure(
        failure="signal", message=f"the worker was {cause}", remedy="See its log; `abliterate retry` tries again"
    )
    if crashes >= CRASHES_ALLOWED:
        return Move(
            "held",
            "crash-loop",
            f"{failure.message}, {crashes} times",
            failure,
            attempts=attempts + 1,
            crashes=crashes,
            stage=ended.stage,
        )
    return Move("queued", "interrupted", failure.message, failure, FIRST_BACKOFF, attempts + 1, crashes, ended.stage)


def after_failure(failure: Failure, *, attempts: int, crashes: int, retries: int) -> Move:
    """The move after a failure that was told: transient ones are tried again, the others end the job."""
    attempts += 1
    if failure.failure not in TRANSIENT:
        return Move("failed", "", failure.message, failure, attempts=attempts, crashes=crashes)
    if attempts > retries:
        return Move(
            "held",
            "requeue-limit",
            f"{failure.message} ({attempts} attempts)",
            failure,
            attempts=attempts,
            crashes=crashes,
        )
    reason, first = TRANSIENT[failure.failure]
    return Move("queued", reason, failure.message, failure, backoff(attempts, first), attempts, crashes)


def jittered(seconds: float, job_id: str, attempt: int) -> float:
    """`seconds`, up to a fifth more: jobs that failed together do not come back together."""
    share = hashlib.sha256(f"{job_id} {attempt}".encode()).digest()[0] / 255
    return seconds * (1 + share / 5)


def backoff(attempt: int, first: float = FIRST_BACKOFF, longest: float = LONGEST_BACKOFF) -> float:
    """Seconds before try `attempt` + 1: doubling, bounded."""
    return float(min(longest, first * 2 ** min(attempt - 1, 30)))


def failure_of(error: AbliteratedError) -> Failure:
    """An error as the journal stores it."""
    return Failure(failure=error.failure, message=error.message, remedy=error.remedy)


def is_passing(error: AbliteratedError) -> bool:
    """Whether waiting may mend it: the engine is away, not unwilling."""
    return isinstance(error, EngineUnavailable)
