"""What is asked, over any of the four chat APIs, as one thing. Pure.

Does not know: models, what an engine can do, how the answer is told.
"""

from __future__ import annotations

import json
from typing import Any, Final, Literal

import msgspec

from abliterated.shapes import messages as anthropic
from abliterated.shapes import openai, responses
from abliterated.shapes.ollama import ChatRequest
from abliterated.shapes.refusals import Refused
from abliterated.shapes.talk import Message

Api = Literal["ollama", "chat", "responses", "messages"]
APIS: Final[dict[str, Api]] = {
    "/api/chat": "ollama",
    "/v1/chat/completions": "chat",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
}


class Asking(msgspec.Struct, frozen=True):
    """`choice`: auto, none, required, or a tool's name behind a colon. `request` is for those who tell the answer."""

    api: Api
    model: str
    request: Any
    messages: list[Message]
    tools: list[dict[str, Any]]
    think: bool | str | None
    form: Any
    options: dict[str, Any]
    stream: bool
    keep_alive: str | float | None = None
    choice: str = "auto"
    several: bool = True
    peculiar: bool = False  # asks for something only the engine can give

    @property
    def needs(self) -> frozenset[str]:
        """What of tools a template must do, by the names of `templates.abilities`. Engines learn from how it tells a
        call how to read one, so that is needed before there was any."""
        if not self.tools:
            return frozenset()
        calls = max((len(message.tool_calls or ()) for message in self.messages), default=0)
        results = any(message.role == "tool" for message in self.messages)
        told = {"tools": True, "calls": True, "results": results, "several calls": calls > 1}
        return frozenset(name for name, needed in told.items() if needed)

    @property
    def images(self) -> bool:
        return any(message.images for message in self.messages)


class _More(msgspec.Struct, frozen=True):
    """What the engine's own reading leaves out."""

    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    previous_response_id: Any = None
    conversation: Any = None
    background: Any = None


def read(route: str, body: bytes) -> Asking:
    """Raises Refused for what no API would take."""
    api = APIS[route]
    try:
        value, _ = json.JSONDecoder().raw_decode(body.decode().lstrip())
        more = msgspec.convert(value, _More)
        match api:
            case "ollama":
                return _ollama(msgspec.convert(value, ChatRequest), more)
            case "chat":
                return _chat(msgspec.convert(value, openai.ChatCompletionRequest), more)
            case "responses":
                return _responses(msgspec.convert(value, responses.ResponsesRequest), more)
            case "messages":
                return _messages(msgspec.convert(value, anthropic.MessagesRequest), more)
    except (ValueError, RecursionError, AttributeError, TypeError) as error:  # a part that should be an object, too
        raise Refused(400, f"invalid JSON: {error}") from error


def _ollama(asked: ChatRequest, more: _More) -> Asking:
    return Asking(
        "ollama", asked.model or "", asked, asked.messages or [], asked.tools or [], asked.think, asked.format or None,
        dict(asked.options or {}), asked.stream is not False, asked.keep_alive, _choice(more.tool_choice),
        more.parallel_tool_calls is not False, bool(asked.debug or asked.logprobs or not asked.messages),
    )  # fmt: skip


def _chat(asked: openai.ChatCompletionRequest, more: _More) -> Asking:
    return Asking(
        "chat", asked.model or "", asked, [openai.read_message(message) for message in asked.messages or []],
        asked.tools or [], openai.read_think((asked.reasoning or {}).get("effort") or asked.reasoning_effort),
        openai.read_form(asked.response_format), _set(openai.settings(asked)), bool(asked.stream), None,
        _choice(more.tool_choice), more.parallel_tool_calls is not False, bool(asked.logprobs or not asked.messages),
    )  # fmt: skip


def _responses(asked: responses.ResponsesRequest, more: _More) -> Asking:
    talk = responses.read_items(asked)
    return Asking(
        "responses", asked.model or "", asked, talk, [responses.read_tool(tool) for tool in asked.tools or []],
        openai.read_think((asked.reasoning or {}).get("effort")), responses.form(asked),
        _set(responses.settings(asked)), bool(asked.stream), None, _choice(more.tool_choice),
        more.parallel_tool_calls is not False,
        bool(more.previous_response_id or more.conversation or more.background or not talk),
    )  # fmt: skip


def _messages(asked: anthropic.MessagesRequest, more: _More) -> Asking:
    several = not (isinstance(more.tool_choice, dict) and more.tool_choice.get("disable_parallel_tool_use"))
    return Asking(
        "messages", asked.model or "", asked, anthropic.read_messages(asked),
        [anthropic.read_tool(tool) for tool in asked.tools or []], anthropic.read_think(asked), None,
        _set(anthropic.settings(asked)), bool(asked.stream), None, _choice(more.tool_choice), several,
        not asked.max_tokens or not asked.messages,
    )  # fmt: skip


def _set(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _choice(asked: Any) -> str:
    """OpenAI's and Anthropic's ways to say it."""
    match asked:
        case "none" | {"type": "none"}:
            return "none"
        case "required" | "any" | {"type": "any"} | {"type": "required"}:
            return "required"
        case {"function": {"name": str(name)}} | {"name": str(name)}:
            return f":{name}"
    return "auto"
