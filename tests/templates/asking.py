"""One conversation asked over each API an engine has, streamed and whole, and its answer brought to one shape.

Does not know: templates, what a good answer is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

Conversation = list[dict[str, Any]]  # in OpenAI's chat shape, arguments as an object


@dataclass
class Answer:
    """`calls`: (name, arguments) in order. `error`: what was said instead of an answer."""

    content: str = ""
    thinking: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    error: str = ""


Ask = Callable[[httpx.Client, str, Conversation, list[Any], bool, bool | None], Answer]


def _send(http: httpx.Client, path: str, body: dict[str, Any]) -> tuple[httpx.Response | None, str]:
    try:
        response = http.post(path, json=body)
    except httpx.HTTPError as error:
        return None, f"{type(error).__name__}: {error}"
    if response.status_code == 404 and "page not found" in response.text:
        return None, "no such route"
    return (response, "") if response.status_code == 200 else (None, f"{response.status_code}: {_told(response)}")


def _told(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
    return str(error.get("message", error) if isinstance(error, dict) else error)[:200]


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.text.splitlines():
        if line.startswith("data: {"):
            yield json.loads(line[6:])


def chat(
    http: httpx.Client, model: str, messages: Conversation, tools: list[Any], stream: bool, think: bool | None
) -> Answer:
    """`/api/chat`."""
    talk = []
    for message in messages:
        said = {key: value for key, value in message.items() if key in ("role", "content", "tool_calls")}
        if message["role"] == "tool":
            said |= {"tool_call_id": message["tool_call_id"], "tool_name": message["name"]}
        talk.append(said)
    body: dict[str, Any] = {"model": model, "messages": talk, "tools": tools, "stream": stream}
    if think is not None:
        body["think"] = think
    response, error = _send(http, "/api/chat", body)
    if response is None:
        return Answer(error=error)
    found = Answer()
    for line in response.text.splitlines():
        part = json.loads(line)
        if "error" in part:
            return Answer(error=str(part["error"])[:200])
        said = part["message"]
        found.content += said.get("content") or ""
        found.thinking += said.get("thinking") or ""
        found.calls += [(one["function"]["name"], one["function"]["arguments"]) for one in said.get("tool_calls") or []]
    return found


def completions(
    http: httpx.Client, model: str, messages: Conversation, tools: list[Any], stream: bool, think: bool | None
) -> Answer:
    """`/v1/chat/completions`."""
    talk = [
        {**message, "content": None, "tool_calls": _as_text(message["tool_calls"])}
        if message.get("tool_calls")
        else message
        for message in messages
    ]
    body: dict[str, Any] = {"model": model, "messages": talk, "stream": stream, "temperature": 0}
    body |= {"tools": tools} if tools else {}
    if think is not None:
        body["reasoning_effort"] = "high" if think else "none"
    response, error = _send(http, "/v1/chat/completions", body)
    if response is None:
        return Answer(error=error)
    found = Answer()
    calls: dict[int, list[str]] = {}
    parts = list(_events(response)) if stream else [response.json()]
    for part in parts:
        if "error" in part:
            return Answer(error=str(part["error"])[:200])
        for choice in part["choices"]:
            said = choice["delta" if stream else "message"]
            found.content += said.get("content") or ""
            found.thinking += said.get("reasoning") or ""
            for place, one in enumerate(said.get("tool_calls") or []):
                call = calls.setdefault(one.get("index", place), ["", ""])
                call[0] += one["function"].get("name") or ""
                call[1] += one["function"].get("arguments") or ""
    found.calls = [(name, _parsed(arguments)) for _, (name, arguments) in sorted(calls.items())]
    return found


def _as_text(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**one, "function": {**one["function"], "arguments": json.dumps(one["function"]["arguments"])}} for one in calls
    ]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def responses(
    http: httpx.Client, model: str, messages: Conversation, tools: list[Any], stream: bool, think: bool | None
) -> Answer:
    """`/v1/responses`."""
    items: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            items.append(
                {"type": "function_call_output", "call_id": message["tool_call_id"], "output": message["content"]}
            )
        elif message.get("tool_calls"):
            for one in _as_text(message["tool_calls"]):
                items.append({"type": "function_call", "call_id": one["id"], **one["function"]})
        else:
            items.append({"type": "message", "role": message["role"], "content": message["content"]})
    body: dict[str, Any] = {"model": model, "input": items, "stream": stream, "temperature": 0}
    body |= {"tools": [{"type": "function", **tool["function"]} for tool in tools]} if tools else {}
    if think is not None:
        body["reasoning"] = {"effort": "high" if think else "none"}
    response, error = _send(http, "/v1/responses", body)
    if response is None:
        return Answer(error=error)
    if not stream:
        return _of_response(response.json())
    found, deltas = None, Answer()
    for event in _events(response):
        match event.get("type"):
            case "response.output_text.delta":
                deltas.content += event["delta"]
            case "response.reasoning_summary_text.delta":
                deltas.thinking += event["delta"]
            case "response.function_call_arguments.done":
                deltas.calls.append((event.get("name"), _parsed(event["arguments"])))
            case "response.completed" | "response.incomplete":
                found = _of_response(event["response"])
            case "error" | "response.failed":
                return Answer(error=str(event)[:200])
    if found is None:
        return Answer(error="the stream never completed")
    if (found.content, found.thinking, len(found.calls)) != (deltas.content, deltas.thinking, len(deltas.calls)):
        return Answer(error=f"what was streamed is not what it ends with: {deltas} {found}"[:300])
    return found


def _of_response(answer: dict[str, Any]) -> Answer:
    found = Answer()
    for item in answer["output"]:
        match item["type"]:
            case "message":
                found.content += "".join(part.get("text", "") for part in item["content"])
            case "reasoning":
                found.thinking += "".join(part.get("text", "") for part in item.get("summary") or [])
            case "function_call":
                found.calls.append((item["name"], _parsed(item["arguments"])))
    return found


def messages_api(
    http: httpx.Client, model: str, messages: Conversation, tools: list[Any], stream: bool, think: bool | None
) -> Answer:
    """`/v1/messages`."""
    talk: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            block = {"type": "tool_result", "tool_use_id": message["tool_call_id"], "content": message["content"]}
            if talk[-1]["role"] == "user":
                talk[-1]["content"].append(block)
            else:
                talk.append({"role": "user", "content": [block]})
        elif message.get("tool_calls"):
            talk.append({"role": "assistant", "content": [
                {"type": "tool_use", "id": one["id"], "name": one["function"]["name"],
                 "input": one["function"]["arguments"]} for one in message["tool_calls"]]})  # fmt: skip
        else:
            talk.append({"role": message["role"], "content": message["content"]})
    body: dict[str, Any] = {"model": model, "messages": talk, "stream": stream, "max_tokens": 400, "temperature": 0}
    if tools:
        body["tools"] = [
            {
                "name": tool["function"]["name"],
                "description": tool["function"]["description"],
                "input_schema": tool["function"]["parameters"],
            }
            for tool in tools
        ]
    if think is not None:
        body["thinking"] = {"type": "enabled", "budget_tokens": 1024} if think else {"type": "disabled"}
    response, error = _send(http, "/v1/messages", body)
    if response is None:
        return Answer(error=error)
    found = Answer()
    blocks: dict[int, dict[str, Any]] = {}
    if stream:
        for event in _events(response):
            match event["type"]:
                case "content_block_start":
                    blocks[event["index"]] = {**event["content_block"], "json": ""}
                case "content_block_delta":
                    delta, block = event["delta"], blocks[event["index"]]
                    for key in ("text", "thinking"):
                        block[key] = (block.get(key) or "") + (delta.get(key) or "")
                    block["json"] += delta.get("partial_json") or ""
                case "error":
                    return Answer(error=str(event)[:200])
    else:
        blocks = dict(enumerate(response.json()["content"]))
    for _, block in sorted(blocks.items()):
        match block["type"]:
            case "text":
                found.content += block["text"]
            case "thinking":
                found.thinking += block["thinking"]
            case "tool_use":
                found.calls.append((block["name"], _parsed(block["json"]) if block.get("json") else block["input"]))
    return found


DIALECTS: dict[str, Ask] = {
    "/api/chat": chat,
    "/v1/chat/completions": completions,
    "/v1/responses": responses,
    "/v1/messages": messages_api,
}
