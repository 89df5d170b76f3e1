"""A conversation and an answer to it, whatever API they are told in.

Does not know: APIs, engines.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import msgspec


class Function(msgspec.Struct, frozen=True):
    name: str = ""
    arguments: dict[str, Any] | None = None
    index: int | None = None


class Call(msgspec.Struct, frozen=True):
    function: Function
    id: str | None = None


class Message(msgspec.Struct, frozen=True):
    role: str
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[Call] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of the answer; a call comes whole, after the text."""

    content: str = ""
    thinking: str = ""
    calls: tuple[ToolCall, ...] = ()
    logprobs: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class End:
    """The last of an answer: why it ended (stop, length) and what it cost. Durations in nanoseconds."""

    reason: str
    prompt_tokens: int = 0
    tokens: int = 0
    prompt_nanoseconds: int = 0
    nanoseconds: int = 0


Events = AsyncGenerator[Piece | End, None]
