"""OpenAI's chat completions (and plain completions) as Ollama speaks them. Arguments are text here.

Does not know: engines, how events are sent. Like Ollama's, it has temperature and top_p at 1 unless told.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from abliterated.shapes.refusals import Refused
from abliterated.shapes.talk import Call, End, Function, Message, Piece, ToolCall


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False


class CompletionRequest(msgspec.Struct, frozen=True):
    model: str | None = None
    prompt: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logprobs: bool | int | None = None
    top_logprobs: int | None = None


class ChatCompletionRequest(CompletionRequest, frozen=True):
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    reasoning: dict[str, Any] | None = None


def settings(request: CompletionRequest) -> dict[str, Any]:
    """As Ollama's options."""
    return {
        "num_predict": request.max_completion_tokens or request.max_tokens,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "seed": request.seed,
        "stop": [request.stop] if isinstance(request.stop, str) else request.stop,
        "frequency_penalty": request.frequency_penalty,
        "presence_penalty": request.presence_penalty,
    }


def read_think(effort: Any) -> bool | str | None:
    """A reasoning effort as Ollama's `think`."""
    if effort is None:
        return None
    if effort not in ("none", "low", "medium", "high", "max"):
        raise Refused(400, f'invalid reasoning value: \'{effort}\' (must be "high", "medium", "low", "max", or "none")')
    return False if effort == "none" else str(effort)


def read_form(wanted: dict[str, Any] | None) -> Any:
    """A response format as Ollama's `format`."""
    match (wanted or {}).get("type"):
        case "json_object":
            return "json"
        case "json_schema":
            return ((wanted or {}).get("json_schema") or {}).get("schema")
    return None


def read_message(message: dict[str, Any]) -> Message:
    """OpenAI's message as Ollama's: content parts joined, arguments parsed."""
    content = message.get("content")
    images: list[str] = []
    if isinstance(content, list):
        texts = []
        for part in content:
            if not isinstance(part, dict):
                raise Refused(400, "invalid message format")
            if part.get("type") == "text":
                texts.append(str(part.get("text", "")))
            elif part.get("type") == "image_url":
                url = part.get("image_url")
                url = url.get("url", "") if isinstance(url, dict) else str(url)
                if not url.startswith("data:"):
                    raise Refused(
                        400, "invalid image input: only data: URLs are read", remedy="Send the image's bytes in one"
                    )
                images.append(url.partition(",")[2])
            else:
                raise Refused(400, "invalid message format")
        content = "\n".join(texts)
    if content is not None and not isinstance(content, str):
        raise Refused(400, f"invalid message content type: {type(content).__name__}")
    calls = []
    for call in message.get("tool_calls") or []:
        function = call.get("function") or {}
        try:
            arguments = json.loads(function.get("arguments") or "{}")
        except ValueError as error:
            raise Refused(400, "invalid tool call arguments") from error
        calls.append(Call(Function(str(function.get("name", "")), arguments), call.get("id")))
    return Message(
        role=str(message.get("role", "")),
        content=content,
        thinking=message.get("reasoning") or message.get("reasoning_content"),
        images=images or None,
        tool_calls=calls or None,
        tool_name=message.get("name"),
        tool_call_id=message.get("tool_call_id"),
    )


class ChatShape:
    """Of a chat."""

    object = "chat.completion"
    prefix = "chatcmpl"

    def delta(self, piece: Piece, calls: int) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant", "content": piece.content}
        if piece.thinking:
            delta["reasoning"] = piece.thinking
        if piece.calls:
            delta["tool_calls"] = [_told(call, index) for index, call in enumerate(piece.calls, calls)]
        logprobs = {"logprobs": {"content": piece.logprobs}} if piece.logprobs else {}
        return {"index": 0, "delta": delta, "finish_reason": None, **logprobs}

    def last(self, reason: str) -> dict[str, Any]:
        return {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": reason}

    def whole(self, pieces: list[Piece], reason: str) -> dict[str, Any]:
        calls = [call for piece in pieces for call in piece.calls]
        message: dict[str, Any] = {"role": "assistant", "content": "".join(piece.content for piece in pieces)}
        if thinking := "".join(piece.thinking for piece in pieces):
            message["reasoning"] = thinking
        if calls:
            message["tool_calls"] = [_told(call, index) for index, call in enumerate(calls)]
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": reason}
        if logprobs := [entry for piece in pieces for entry in piece.logprobs]:
            choice["logprobs"] = {"content": logprobs}
        return choice


class TextShape:
    """Of a plain completion."""

    object = "text_completion"
    prefix = "cmpl"

    def delta(self, piece: Piece, calls: int) -> dict[str, Any]:
        return {"index": 0, "text": piece.content, "finish_reason": None}

    def last(self, reason: str) -> dict[str, Any]:
        return {"index": 0, "text": "", "finish_reason": reason}

    def whole(self, pieces: list[Piece], reason: str) -> dict[str, Any]:
        return {"index": 0, "text": "".join(piece.content for piece in pieces), "finish_reason": reason}


def _told(call: ToolCall, index: int) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call.id, "index": index, "type": "function", "function": {"name": call.name, "arguments": arguments}}


Shape = ChatShape | TextShape


def head(shape: Shape, asked: str, *, stream: bool) -> dict[str, Any]:
    """What every part of one answer begins with."""
    chunk = ".chunk" if stream and shape.object == "chat.completion" else ""
    return {
        "id": f"{shape.prefix}-{secrets.randbelow(1000)}",
        "object": shape.object + chunk,
        "created": int(time.time()),
        "model": asked,
        "system_fingerprint": "fp_ollama",
    }


async def whole(shape: Shape, asked: str, events: AsyncGenerator[Piece | End, None]) -> dict[str, Any]:
    """The one object of an answer that is not streamed."""
    pieces: list[Piece] = []
    end = End("stop")
    async for event in events:
        if isinstance(event, End):
            end = event
        else:
            pieces.append(event)
    choices = [shape.whole(pieces, _reason(end, sum(len(piece.calls) for piece in pieces)))]
    return {**head(shape, asked, stream=False), "choices": choices, "usage": _usage(end)}


async def chunks(
    shape: Shape, asked: str, events: AsyncGenerator[Piece | End, None], *, usage: bool
) -> AsyncGenerator[dict[str, Any], None]:
    """The parts of a streamed one; with `usage` the last of them counts."""
    begin = head(shape, asked, stream=True)
    calls = 0
    empty = {"usage": None} if usage else {}
    async for event in events:
        if isinstance(event, End):
            yield {**begin, "choices": [shape.last(_reason(event, calls))], **empty}
            if usage:
                yield {**begin, "choices": [], "usage": _usage(event)}
        else:
            yield {**begin, "choices": [shape.delta(event, calls)], **empty}
            calls += len(event.calls)


def _reason(end: End, calls: int) -> str:
    return "tool_calls" if calls and end.reason == "stop" else end.reason


def _usage(end: End) -> dict[str, int]:
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.tokens,
        "total_tokens": end.prompt_tokens + end.tokens,
    }
