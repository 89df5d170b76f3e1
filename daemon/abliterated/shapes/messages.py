"""Anthropic's Messages as Ollama speaks them: content blocks in and out, whole or as named events.

Does not know: engines, how events are sent.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from abliterated.shapes.refusals import Refused
from abliterated.shapes.talk import Call, End, Function, Message, Piece

Event = tuple[str, dict[str, Any]]


class MessagesRequest(msgspec.Struct, frozen=True):
    model: str | None = None
    max_tokens: int | None = None
    messages: list[dict[str, Any]] | None = None
    system: str | list[dict[str, Any]] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None


def check(request: MessagesRequest) -> None:
    """What must be there."""
    if not request.model:
        raise Refused(400, "model is required")
    if not request.max_tokens or request.max_tokens < 1:
        raise Refused(400, "max_tokens is required and must be positive")
    if not request.messages:
        raise Refused(400, "messages is required")


def settings(request: MessagesRequest) -> dict[str, Any]:
    """As Ollama's options."""
    return {
        "num_predict": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "stop": request.stop_sequences,
    }


def read_messages(request: MessagesRequest) -> list[Message]:
    """The conversation; each result of a tool is a message of its own, before the text that came with it."""
    talk: list[Message] = []
    if request.system:
        text = request.system if isinstance(request.system, str) else _text(request.system)
        talk.append(Message("system", text))
    for message in request.messages or []:
        content = message.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
            raise Refused(400, "invalid message content: give a string or a list of blocks")
        talk += _read(str(message.get("role", "")), blocks)
    return talk


def _text(blocks: list[dict[str, Any]]) -> str:
    return "".join(str(block.get("text", "")) for block in blocks if block.get("type") == "text")


def _read(role: str, blocks: list[dict[str, Any]]) -> list[Message]:
    texts, images, calls, results = [], [], [], []
    thought = ""
    for block in blocks:
        match block.get("type"):
            case "text":
                texts.append(str(block.get("text", "")))
            case "image":
                images.append(_image(block))
            case "thinking":
                thought += str(block.get("thinking", ""))
            case "redacted_thinking":
                pass
            case "tool_use":
                arguments = block.get("input")
                if not isinstance(arguments, dict):
                    raise Refused(400, "tool_use block needs an object as 'input'")
                calls.append(Call(Function(str(block.get("name", "")), arguments), block.get("id")))
            case "tool_result":
                results.append(_result(block))
            case kind:
                raise Refused(400, f"unsupported content block: {kind!r}", remedy="Send text, images and tools only")
    said = Message(role, "".join(texts), thinking=thought or None, images=images or None, tool_calls=calls or None)
    return [*results, said] if texts or images or calls or thought or not results else results


def _image(block: dict[str, Any]) -> str:
    source = block.get("source") or {}
    if source.get("type") != "base64":
        raise Refused(
            400, "invalid image source: only base64 is read", remedy="Send the image's bytes, not its address"
        )
    return str(source.get("data", ""))


def _result(block: dict[str, Any]) -> Message:
    content = block.get("content")
    images: list[str] = []
    if isinstance(content, list):
        images = [_image(part) for part in content if part.get("type") == "image"]
        content = _text(content)
    return Message("tool", str(content or ""), images=images or None, tool_call_id=block.get("tool_use_id"))


def read_tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type", "custom") != "custom":
        raise Refused(400, f"unsupported tool type: {tool.get('type')!r}", remedy="Only tools of the client's own run")
    function = {"name": tool.get("name", ""), "description": tool.get("description", "")}
    return {"type": "function", "function": {**function, "parameters": tool.get("input_schema") or {}}}


def read_think(request: MessagesRequest) -> bool | str | None:
    match (request.thinking or {}).get("type"):
        case "enabled" | "adaptive":
            return True
        case "disabled":
            return False
    effort = str((request.output_config or {}).get("effort") or "").strip().lower()
    effort = "high" if effort == "xhigh" else effort
    return effort if effort in ("low", "medium", "high", "max") else None


@dataclass
class Reply:
    """The message as it grows: its finished blocks and the one that is open."""

    model: str
    identity: str = field(default_factory=lambda: f"msg_{secrets.token_hex(12)}")
    blocks: list[dict[str, Any]] = field(default_factory=list)
    end: End = field(default_factory=lambda: End("stop"))

    def whole(self, *, begun: bool = False) -> dict[str, Any]:
        reason = None if begun else self.reason()
        usage = {"input_tokens": self.end.prompt_tokens, "output_tokens": self.end.tokens}
        return {
            "id": self.identity, "type": "message", "role": "assistant", "model": self.model,
            "content": [] if begun else self.blocks, "stop_reason": reason, "stop_sequence": None, "usage": usage,
        }  # fmt: skip

    def reason(self) -> str:
        if any(block["type"] == "tool_use" for block in self.blocks):
            return "tool_use"
        return "max_tokens" if self.end.reason == "length" else "end_turn"

    def begin(self, block: dict[str, Any]) -> Event:
        self.blocks.append(block)
        return _event("content_block_start", index=len(self.blocks) - 1, content_block=dict(block))

    def delta(self, kind: str, key: str, text: str) -> Event:
        return _event("content_block_delta", index=len(self.blocks) - 1, delta={"type": kind, key: text})

    def stop(self) -> Event:
        return _event("content_block_stop", index=len(self.blocks) - 1)


def _event(kind: str, **more: Any) -> Event:
    return kind, {"type": kind, **more}


async def events(pieces: AsyncGenerator[Piece | End, None], reply: Reply) -> AsyncGenerator[Event, None]:
    """The answer's events; `reply` grows with them."""
    begun, open_kind = False, ""
    async for piece in pieces:
        if not begun:  # what is refused is refused before the first event
            begun = True
            yield _event("message_start", message=reply.whole(begun=True))
        if isinstance(piece, End):
            reply.end = piece
            continue
        for kind, text in (("thinking", piece.thinking), ("text", piece.content)):
            if not text:
                continue
            if open_kind != kind:
                if open_kind:
                    yield reply.stop()
                empty: dict[str, Any] = {"type": kind, kind: ""}
                yield reply.begin(empty | ({"signature": ""} if kind == "thinking" else {}))
                open_kind = kind
            reply.blocks[-1][kind] += text
            yield reply.delta(f"{kind}_delta", kind, text)
        if piece.calls and open_kind:
            yield reply.stop()
            open_kind = ""
        for event in _calls(reply, piece):
            yield event
    if open_kind:
        yield reply.stop()
    usage = {"input_tokens": reply.end.prompt_tokens, "output_tokens": reply.end.tokens}
    yield _event("message_delta", delta={"stop_reason": reply.reason(), "stop_sequence": None}, usage=usage)
    yield _event("message_stop")


def _calls(reply: Reply, piece: Piece) -> list[Event]:
    events = []
    for call in piece.calls:
        block: dict[str, Any] = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
        events.append(reply.begin(block))
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        events += [reply.delta("input_json_delta", "partial_json", arguments), reply.stop()]
        block["input"] = call.arguments
    return events
