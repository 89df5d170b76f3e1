"""Ollama's messages, tools, think and format as llama.cpp's chat endpoint wants them. Pure.

Does not know: the model's template (llama.cpp renders it), processes, streaming.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from abliterated.engine.models import Model
from abliterated.shapes.refusals import Refused
from abliterated.shapes.talk import Call, Message


def messages(model: Model, asked: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation: the model's SYSTEM unless the request brings its own, its MESSAGEs, then the request's."""
    before = msgspec.convert(model.messages, list[Message])
    whole = [*before, *asked]
    if model.system and (not whole or whole[0].role != "system") and not (asked and asked[0].role == "system"):
        whole.insert(0, Message("system", model.system))
    translated: list[dict[str, Any]] = []
    open_calls: list[str] = []  # calls not answered yet, for tool messages that do not say which they answer
    for number, message in enumerate(whole):
        entry: dict[str, Any] = {"role": message.role, "content": _content(model, message)}
        if message.thinking:
            entry["reasoning_content"] = message.thinking
        if message.tool_calls:
            entry["tool_calls"] = [
                _call(call, call.id or f"call_{number}_{place}") for place, call in enumerate(message.tool_calls)
            ]
            open_calls = [call["id"] for call in entry["tool_calls"]]
        if message.role == "tool":
            identity = message.tool_call_id or (open_calls[0] if open_calls else "call_0")
            if identity in open_calls:
                open_calls.remove(identity)
            entry["tool_call_id"] = identity
            if message.tool_name:
                entry["name"] = message.tool_name
        translated.append(entry)
    return translated


def _content(model: Model, message: Message) -> Any:
    if not message.images:
        return message.content or ""
    if model.projector is None:
        raise Refused(400, f"{model.name!r} does not support images", remedy="Ask a model that lists vision in `show`")
    return [
        {"type": "text", "text": message.content or ""},
        *({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}} for image in message.images),
    ]


def _call(call: Call, identity: str) -> dict[str, Any]:
    arguments = json.dumps(call.function.arguments or {}, ensure_ascii=False)
    return {"id": identity, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def thinking(model: Model, asked: str, think: bool | str | None) -> dict[str, Any]:
    """How the template is asked to think. Models that can, do, unless told otherwise; `asked` is the name in the
    request.
    """
    able = "thinking" in model.capabilities
    if think not in (None, False) and not able:
        raise Refused(400, f'"{asked}" does not support thinking')
    if isinstance(think, str) and think not in ("low", "medium", "high", "max"):
        raise Refused(400, f'invalid think value: "{think}" (must be "high", "medium", "low", "max", true, or false)')
    if not able:
        return {"reasoning_format": "none"}
    kwargs: dict[str, Any] = {"enable_thinking": think is not False}
    if isinstance(think, str):
        kwargs["reasoning_effort"] = think
    return {"reasoning_format": "deepseek", "chat_template_kwargs": kwargs}


def schema(form: Any) -> dict[str, Any] | None:
    """The JSON schema `format` asks for; None where it asks for nothing."""
    if form is None or form == "":
        return None
    if form == "json":
        return {"type": "object"}
    if isinstance(form, dict):
        return form
    raise Refused(400, f'invalid format: {json.dumps(form)}; expected "json" or a valid JSON Schema object')


def constraint(form: Any) -> dict[str, Any]:
    """`format` in a chat request to llama.cpp."""
    wanted = schema(form)
    if wanted is None:
        return {}
    if form == "json":
        return {"response_format": {"type": "json_object"}}
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted}}}
