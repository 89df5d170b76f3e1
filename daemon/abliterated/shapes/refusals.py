"""A request that can't be served, in Ollama's shape, OpenAI's or Anthropic's.

Does not know: which route raised, how bytes are sent.
"""

from __future__ import annotations

import secrets
from typing import Any

from abliterate.contract.errors import EngineRefused


class Refused(EngineRefused):
    """A request the engine can't serve, with the HTTP status it gets."""

    def __init__(self, status: int, message: str, *, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.status = status


def ollama_shape(error: Refused) -> dict[str, Any]:
    return {"error": str(error)}


def openai_shape(error: Refused) -> dict[str, Any]:
    kind = {400: "invalid_request_error", 404: "not_found_error"}.get(error.status, "api_error")
    return {"error": {"message": str(error), "type": kind, "param": None, "code": None}}


def anthropic_shape(error: Refused) -> dict[str, Any]:
    kinds = {400: "invalid_request_error", 404: "not_found_error", 413: "request_too_large", 503: "overloaded_error"}
    told = {"type": kinds.get(error.status, "api_error"), "message": str(error)}
    return {"type": "error", "error": told, "request_id": f"req_{secrets.token_hex(12)}"}
