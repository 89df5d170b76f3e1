"""Ollama's own chat: its request, and the lines of an answer. Arguments are objects here.

Does not know: engines, how lines are sent.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from datetime import UTC, datetime
from typing import Any

import msgspec

from abliterated.shapes.talk import End, Message, Piece, ToolCall


class Request(msgspec.Struct, frozen=True, rename={"debug": "_debug_render_only"}):
    model: str | None = None
    stream: bool | None = None
    format: Any = None
    keep_alive: str | float | None = None
    options: dict[str, Any] | None = None
    think: bool | str | None = None
    truncate: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    debug: bool | None = None


class ChatRequest(Request, frozen=True):
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None


def now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def told(call: ToolCall, index: int) -> dict[str, Any]:
    """A call as Ollama tells it: arguments are an object."""
    return {"id": call.id, "function": {"index": index, "name": call.name, "arguments": call.arguments}}


Wrap = Callable[[dict[str, Any]], dict[str, Any]]


def as_message(text: dict[str, Any]) -> dict[str, Any]:
    """What chat wraps a piece in; generate wraps it in nothing."""
    return {"message": {"role": "assistant", **text}}


async def lines(
    asked: str,
    pieces: AsyncGenerator[Piece | End, None],
    wrap: Wrap,
    key: str,
    counters: Callable[[End], dict[str, int]],
) -> AsyncGenerator[dict[str, Any], None]:
    """The answer line by line. `key` names the text; `counters` what the end cost."""
    calls = 0
    async for event in pieces:
        line: dict[str, Any] = {"model": asked, "created_at": now()}
        if isinstance(event, End):
            yield {**line, **wrap({key: ""}), "done": True, "done_reason": event.reason, **counters(event)}
        else:
            yield {**line, **wrap(_text(event, key, calls)), "done": False, **_logprobs(event)}
            calls += len(event.calls)


def _text(piece: Piece, key: str, calls: int) -> dict[str, Any]:
    text: dict[str, Any] = {key: piece.content}
    if piece.thinking:
        text["thinking"] = piece.thinking
    if piece.calls:
        text["tool_calls"] = [told(call, index) for index, call in enumerate(piece.calls, calls)]
    return text


def _logprobs(piece: Piece) -> dict[str, Any]:
    return {"logprobs": piece.logprobs} if piece.logprobs else {}


async def whole(lines: AsyncGenerator[dict[str, Any], None], key: str) -> dict[str, Any]:
    """The stream's lines as the one object of `stream: false`."""
    content, thinking, calls, logprobs, last = "", "", [], [], {}
    async for last in lines:
        part = last.get("message", last)
        content += part.get(key, "")
        thinking += part.get("thinking", "")
        calls += part.get("tool_calls", [])
        logprobs += last.get("logprobs", [])
    part = last.get("message", last)
    part[key] = content
    if thinking:
        part["thinking"] = thinking
    if calls:
        part["tool_calls"] = calls
    if logprobs:
        last["logprobs"] = logprobs
    return last
