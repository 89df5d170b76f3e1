"""OpenAI's Responses as Ollama speaks them: items in, items out, whole or as named events; nothing is kept.

A reasoning item carries its text in `encrypted_content` too, so that a client which replays its items replays the
thought. Does not know: engines, how events are sent.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from abliterated.shapes.openai import read_form, read_message
from abliterated.shapes.refusals import Refused
from abliterated.shapes.talk import End, Message, Piece, ToolCall

Event = tuple[str, dict[str, Any]]


class ResponsesRequest(msgspec.Struct, frozen=True):
    model: str | None = None
    input: str | list[dict[str, Any]] = ""
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    truncation: str | None = None
    metadata: dict[str, Any] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None


def settings(request: ResponsesRequest) -> dict[str, Any]:
    """As Ollama's options."""
    return {
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": request.top_p,
        "num_predict": request.max_output_tokens,
    }


def form(request: ResponsesRequest) -> Any:
    """As Ollama's `format`."""
    given = (request.text or {}).get("format") or {}
    return read_form({"type": given.get("type"), "json_schema": given})


def read_items(request: ResponsesRequest) -> list[Message]:
    """The conversation: neighbouring calls are one message of the assistant's, a thought belongs to what follows it."""
    talk = [Message("system", request.instructions)] if request.instructions else []
    if isinstance(request.input, str):
        return [*talk, Message("user", request.input)] if request.input else talk
    thought = ""
    for item in request.input:
        match item.get("type", "message"):
            case "reasoning":
                told = "".join(str(part.get("text", "")) for part in item.get("summary") or [])
                thought = str(item.get("encrypted_content") or told)
            case "message":
                message = read_message({"role": _role(item), "content": _parts(item.get("content"))})
                if message.role == "assistant" and thought:
                    message, thought = msgspec.structs.replace(message, thinking=thought), ""
                talk.append(message)
            case "function_call":
                said = read_message(
                    {
                        "role": "assistant",
                        "content": "",
                        "reasoning": thought or None,
                        "tool_calls": [{"id": item.get("call_id"), "function": item}],
                    }
                )
                thought = ""
                if talk and talk[-1].role == "assistant" and (talk[-1].tool_calls or not said.thinking):
                    calls = [*(talk[-1].tool_calls or []), *(said.tool_calls or [])]
                    said = msgspec.structs.replace(talk.pop(), tool_calls=calls)
                talk.append(said)
            case "function_call_output":
                output = _parts(item.get("output"))
                talk.append(
                    read_message({"role": "tool", "content": output, "tool_call_id": str(item.get("call_id") or "")})
                )
            case kind:
                raise Refused(400, f"unknown input item type: {kind!r}")
    return [*talk, Message("assistant", "", thinking=thought)] if thought else talk


def _role(item: dict[str, Any]) -> str:
    role = str(item.get("role", ""))
    return "system" if role == "developer" else role


def _parts(content: Any) -> Any:
    """Content parts by the names the chat API has for them."""
    if not isinstance(content, list):
        return content
    found: list[dict[str, Any]] = []
    for part in content:
        match part.get("type"):
            case "input_text" | "output_text" | "text" | "refusal":
                found.append({"type": "text", "text": part.get("text") or part.get("refusal") or ""})
            case "input_image":
                found.append({"type": "image_url", "image_url": {"url": str(part.get("image_url") or "")}})
            case kind:
                raise Refused(400, f"unknown content type: {kind!r}")
    return found


def read_tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type", "function") != "function":
        raise Refused(400, f"unsupported tool type: {tool.get('type')!r}", remedy="Only function tools are run here")
    known = {key: tool[key] for key in ("name", "description", "parameters") if tool.get(key) is not None}
    return {"type": "function", "function": known}


@dataclass
class Reply:
    """The response as it grows: its items, and the events that tell of them."""

    request: ResponsesRequest
    model: str
    identity: str = field(default_factory=lambda: f"resp_{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    items: list[dict[str, Any]] = field(default_factory=list)
    number: int = 0

    def event(self, kind: str, **more: Any) -> Event:
        self.number += 1
        return kind, {"type": kind, "sequence_number": self.number - 1, **more}

    def whole(self, status: str, end: End | None = None) -> dict[str, Any]:
        request = self.request
        usage = None
        if end:
            usage = {
                "input_tokens": end.prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": end.tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": end.prompt_tokens + end.tokens,
            }
        return {
            "id": self.identity, "object": "response", "created_at": self.created,
            "completed_at": int(time.time()) if end else None, "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self.model, "previous_response_id": None, "instructions": request.instructions,
            "output": self.items, "error": None, "tools": request.tools or [], "tool_choice": "auto",
            "truncation": request.truncation or "disabled", "parallel_tool_calls": True,
            "text": request.text or {"format": {"type": "text"}},
            "top_p": 1.0 if request.top_p is None else request.top_p, "presence_penalty": 0, "frequency_penalty": 0,
            "top_logprobs": 0, "temperature": 1.0 if request.temperature is None else request.temperature,
            "reasoning": request.reasoning, "usage": usage, "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": None, "store": False, "background": False, "service_tier": "default",
            "metadata": request.metadata or {}, "safety_identifier": None, "prompt_cache_key": None,
        }  # fmt: skip

    def thought(self, text: str, open_item: dict[str, Any]) -> Event:
        open_item["summary"][0]["text"] += text
        return self.event(
            "response.reasoning_summary_text.delta", item_id=open_item["id"], output_index=len(self.items),
            summary_index=0, delta=text,
        )  # fmt: skip

    def text(self, text: str, open_item: dict[str, Any]) -> Event:
        open_item["content"][0]["text"] += text
        return self.event(
            "response.output_text.delta", item_id=open_item["id"], output_index=len(self.items), content_index=0,
            delta=text, logprobs=[],
        )  # fmt: skip

    def begin(self, kind: str) -> tuple[dict[str, Any], list[Event]]:
        """A reasoning item or a message, still empty."""
        place = len(self.items)
        if kind == "reasoning":
            item: dict[str, Any] = {"id": f"rs_{secrets.token_hex(8)}", "type": kind, "summary": []}
            events = [self.event("response.output_item.added", output_index=place, item=_copy(item))]
            item["summary"] = [{"type": "summary_text", "text": ""}]
            return item, events
        head = {"id": f"msg_{secrets.token_hex(8)}", "type": kind, "status": "in_progress", "role": "assistant"}
        item = {**head, "content": []}
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        events = [
            self.event("response.output_item.added", output_index=place, item=_copy(item)),
            self.event(
                "response.content_part.added", item_id=item["id"], output_index=place, content_index=0, part=_copy(part)
            ),
        ]
        item["content"] = [part]
        return item, events

    def finish(self, item: dict[str, Any]) -> list[Event]:
        place = len(self.items)
        where = {"item_id": item["id"], "output_index": place}
        if item["type"] == "reasoning":
            text = item["summary"][0]["text"]
            item["encrypted_content"] = text
            events = [self.event("response.reasoning_summary_text.done", **where, summary_index=0, text=text)]
        else:
            item["status"] = "completed"
            part = item["content"][0]
            events = [
                self.event("response.output_text.done", **where, content_index=0, text=part["text"], logprobs=[]),
                self.event("response.content_part.done", **where, content_index=0, part=_copy(part)),
            ]
        self.items.append(item)
        return [*events, self.event("response.output_item.done", output_index=place, item=_copy(item))]

    def call(self, call: ToolCall) -> list[Event]:
        place, arguments = len(self.items), json.dumps(call.arguments, ensure_ascii=False)
        item = {
            "id": f"fc_{secrets.token_hex(8)}", "type": "function_call", "status": "in_progress", "call_id": call.id,
            "name": call.name, "arguments": "",
        }  # fmt: skip
        where = {"item_id": item["id"], "output_index": place}
        events = [
            self.event("response.output_item.added", output_index=place, item=_copy(item)),
            self.event("response.function_call_arguments.delta", **where, delta=arguments),
            self.event("response.function_call_arguments.done", **where, name=call.name, arguments=arguments),
        ]
        item |= {"status": "completed", "arguments": arguments}
        self.items.append(item)
        return [*events, self.event("response.output_item.done", output_index=place, item=_copy(item))]


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    """As it is now: an event is written later than it is made."""
    return {key: list(value) if isinstance(value, list) else value for key, value in item.items()}


async def events(pieces: AsyncGenerator[Piece | End, None], reply: Reply) -> AsyncGenerator[Event, None]:
    """The answer's events; `reply` grows with them."""
    open_item: dict[str, Any] | None = None
    begun, end = False, End("stop")
    async for piece in pieces:
        if not begun:  # what is refused is refused before the first event
            begun = True
            yield reply.event("response.created", response=reply.whole("in_progress"))
            yield reply.event("response.in_progress", response=reply.whole("in_progress"))
        if isinstance(piece, End):
            end = piece
            continue
        for kind, text in (("reasoning", piece.thinking), ("message", piece.content)):
            if not text:
                continue
            if open_item and open_item["type"] != kind:
                for event in reply.finish(open_item):
                    yield event
                open_item = None
            if open_item is None:
                open_item, begun_with = reply.begin(kind)
                for event in begun_with:
                    yield event
            yield reply.thought(text, open_item) if kind == "reasoning" else reply.text(text, open_item)
        for event in _calls(reply, piece, open_item):
            yield event
        open_item = None if piece.calls else open_item
    if open_item is None and all(item["type"] == "reasoning" for item in reply.items):
        open_item, begun_with = reply.begin("message")  # an empty answer is an answer
        for event in begun_with:
            yield event
    if open_item:
        for event in reply.finish(open_item):
            yield event
    status = "incomplete" if end.reason == "length" else "completed"
    yield reply.event(f"response.{status}", response=reply.whole(status, end))


def _calls(reply: Reply, piece: Piece, open_item: dict[str, Any] | None) -> list[Event]:
    events = reply.finish(open_item) if open_item and piece.calls else []
    return events + [event for call in piece.calls for event in reply.call(call)]
