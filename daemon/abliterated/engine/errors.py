"""What the engine answers when it can't: a status and a sentence.

Does not know: which route raised, how bytes are sent.
"""

from __future__ import annotations

import logging

from abliterate.contract.errors import AbliteratedError
from abliterated.shapes.refusals import Refused

log = logging.getLogger(__name__)


class RunnerDied(Refused):
    """The process that held the model ended while it was needed."""

    def __init__(self, reason: str) -> None:
        super().__init__(500, f"llama runner process has terminated: {reason}")


class RunnerGone(RunnerDied):
    """The process had ended before it was given anything to do: asking another one is safe."""


class LoadFailed(Refused):
    """llama.cpp would not open the model."""

    def __init__(self, reason: str) -> None:
        super().__init__(500, f"unable to load model: {reason}")


class ContextExceeded(Refused):
    """The prompt has more tokens than the context window."""

    def __init__(self, message: str) -> None:
        super().__init__(400, message)


def refusal(error: Exception) -> Refused:
    """Whatever went wrong, as something to answer; what nobody foresaw goes to the log in full."""
    match error:
        case Refused():
            return error
        case AbliteratedError():
            return Refused(500, str(error))
        case OSError():
            log.error("the disk failed a request", exc_info=error, extra={"action": "request"})
            return Refused(
                500,
                f"the engine's disk failed: {error.strerror}",
                remedy="Free some room where its models are; its log names the file",
            )
    log.error("a request failed", exc_info=error, extra={"action": "request"})
    return Refused(500, "internal error of the embedded engine", remedy="See its log")


def model_not_found(name: str) -> Refused:
    return Refused(404, f"model '{name}' not found")


def invalid_name() -> Refused:
    return Refused(400, "invalid model name")
