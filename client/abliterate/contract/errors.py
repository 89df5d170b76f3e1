"""The error tree both sides share.

Every error says three things: what failed, on what, and what to do next (`remedy`). The command layer alone
turns one into a line on stderr and an exit code; a worker turns one into `failure.json` and the same exit code.
Rooms may subclass these; no exception of a library crosses a room's wall.

Does not know: which room raised it, how it is printed.
"""

from __future__ import annotations

from typing import ClassVar, Literal

FailureClass = Literal[
    "recipe", "model", "auth", "oom-gpu", "oom-host", "disk", "signal", "timeout", "ollama", "cancelled", "bug"
]


class AbliteratedError(Exception):
    """Base of all errors we raise on purpose.

    `message` is one line: what failed, on what. `remedy` is one line: what to do next.
    `failure` is the class the journal stores; `exit_code` what a command exits with.
    """

    failure: ClassVar[FailureClass] = "bug"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}. {self.remedy}" if self.remedy else self.message


class RecipeError(AbliteratedError):
    """The recipe, an option or the configuration is wrong; running it again changes nothing."""

    failure = "recipe"
    exit_code = 2


class ModelError(AbliteratedError):
    """The model can't be read, measured or edited as asked."""

    failure = "model"
    exit_code = 3


class DiskError(AbliteratedError):
    """Not enough room, or a write failed; nothing half-written is visible."""

    failure = "disk"
    exit_code = 4


class EngineRefused(AbliteratedError):
    """Ollama (or the embedded engine) answered, and said no."""

    failure = "ollama"
    exit_code = 5


class ConflictError(AbliteratedError):
    """Something of that name is there already and is not ours to overwrite."""

    failure = "ollama"
    exit_code = 6


class NotFound(AbliteratedError):
    """No job, model or file of that name."""

    failure = "model"
    exit_code = 7


class EngineUnavailable(AbliteratedError):
    """Ollama does not answer now; trying again later may succeed."""

    failure: ClassVar[FailureClass] = "ollama"
    exit_code = 75


class AlreadyRunning(AbliteratedError):
    """Another process holds the home, the port or the lock."""

    failure = "bug"
    exit_code = 75


class DaemonUnavailable(AbliteratedError):
    """The daemon's control socket does not answer."""

    failure = "bug"
    exit_code = 69


class OutOfMemory(AbliteratedError):
    """The device has too little memory for this job."""

    failure = "oom-gpu"
    exit_code = 70


class OutOfHostMemory(AbliteratedError):
    """The machine has too little memory for this job."""

    failure = "oom-host"
    exit_code = 70


class Cancelled(AbliteratedError):
    """The run was asked to stop and did."""

    failure = "cancelled"
    exit_code = 86
