"""The conversation with a runner: one request to llama.cpp's server, its answer as pieces.

Does not know: Ollama's or OpenAI's shapes, which runner it is.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import aiohttp

from abliterated.engine.errors import ContextExceeded, RunnerGone
from abliterated.engine.pool import Runner
from abliterated.shapes.refusals import Refused
from abliterated.shapes.talk import End, Events, Piece, ToolCall

_AGAIN = "Ask again; if it stays so, unload the model with keep_alive 0 first"


async def ask(runner: Runner, path: str, body: dict[str, Any]) -> Any:
    """One request, one JSON answer."""
    try:
        async with _session(runner).post(f"http://runner{path}", json=body) as response:
            return _checked(response.status, await response.read())
    except (aiohttp.ClientError, OSError) as error:
        raise await _broken(runner, error) from error


async def chat(runner: Runner, body: dict[str, Any]) -> Events:
    """A chat through the model's own template."""
    calls: dict[int, dict[str, str]] = {}
    reason = "stop"
    request = {**body, "stream_options": {"include_usage": True}}
    async with aclosing(_stream(runner, "/v1/chat/completions", request)) as events:
        async for event in events:
            for choice in event.get("choices") or []:
                delta = choice.get("delta") or {}
                _gather(calls, delta.get("tool_calls") or [])
                content, thinking = delta.get("content") or "", delta.get("reasoning_content") or ""
                logprobs = (choice.get("logprobs") or {}).get("content") or []
                if content or thinking or logprobs:
                    yield Piece(content, thinking, logprobs=logprobs)
                reason = choice.get("finish_reason") or reason
            if "usage" in event and not event.get("choices"):
                if whole := _whole(calls, cut=reason == "length"):
                    yield Piece(calls=whole)
                yield _end("length" if reason == "length" else "stop", event.get("timings") or {})
                return
    raise await _broken(runner, None)


async def complete(runner: Runner, body: dict[str, Any]) -> Events:
    """A completion of the prompt as it stands."""
    async with aclosing(_stream(runner, "/completion", body)) as events:
        async for event in events:
            if event.get("content"):
                yield Piece(event["content"], logprobs=event.get("completion_probabilities") or [])
            if event.get("stop"):
                yield _end("length" if event.get("stop_type") == "limit" else "stop", event.get("timings") or {})
                return
    raise await _broken(runner, None)


def _gather(calls: dict[int, dict[str, str]], parts: list[dict[str, Any]]) -> None:
    """Calls come in pieces; add these to what is there."""
    for part in parts:
        call = calls.setdefault(part.get("index", 0), {"id": "", "name": "", "arguments": ""})
        function = part.get("function") or {}
        call["id"] += part.get("id") or ""
        call["name"] += function.get("name") or ""
        call["arguments"] += function.get("arguments") or ""


def _whole(calls: dict[int, dict[str, str]], *, cut: bool) -> tuple[ToolCall, ...]:
    """The calls whose arguments are whole; one that num_predict cut off is dropped."""
    found: list[ToolCall] = []
    for _, call in sorted(calls.items()):
        try:
            arguments = json.loads(call["arguments"] or "{}")
            if not isinstance(arguments, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if cut:
                continue
            raise Refused(
                500,
                f"the model returned invalid tool call arguments for {call['name']!r}: {error}",
                remedy="Ask again, or give the tool an object as its parameters",
            ) from error
        found.append(ToolCall(call["id"], call["name"], arguments))
    return tuple(found)


def _end(reason: str, timings: dict[str, Any]) -> End:
    return End(
        reason,
        prompt_tokens=timings.get("cache_n", 0) + timings.get("prompt_n", 0),
        tokens=timings.get("predicted_n", 0),
        prompt_nanoseconds=int(timings.get("prompt_ms", 0) * 1e6),
        nanoseconds=int(timings.get("predicted_ms", 0) * 1e6),
    )


async def _stream(runner: Runner, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a streamed answer. Leaving early closes the connection, which is how llama.cpp learns to stop."""
    try:
        async with _session(runner).post(f"http://runner{path}", json={**body, "stream": True}) as response:
            if response.status != 200:
                _checked(response.status, await response.read())
            rest = b""
            async for data in response.content.iter_any():
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: {"):
                        event = json.loads(line[6:])
                        if "error" in event:
                            raise _refusal(500, event["error"])
                        yield event
                    elif line.startswith(b"error: "):
                        raise _refusal(500, json.loads(line[7:]))
    except (aiohttp.ClientError, OSError) as error:
        raise await _broken(runner, error) from error


def _session(runner: Runner) -> aiohttp.ClientSession:
    if runner.session is None or runner.ended.is_set():
        raise RunnerGone(runner.reason())
    return runner.session


def _checked(status: int, data: bytes) -> Any:
    try:
        answer = json.loads(data)
    except ValueError as error:
        raise Refused(500, f"llama.cpp answered {status} without JSON", remedy=_AGAIN) from error
    if status != 200:
        raise _refusal(status, answer.get("error", answer))
    return answer


def _refusal(status: int, error: Any) -> Refused:
    if not isinstance(error, dict):
        return Refused(status, str(error))
    message = str(error.get("message", error))
    if error.get("type") == "exceed_context_size_error":
        return ContextExceeded(message)
    code = error.get("code")
    return Refused(code if isinstance(code, int) and 400 <= code < 600 else status, message)


async def _broken(runner: Runner, error: BaseException | None) -> Refused:
    died = await runner.died()
    if died and isinstance(error, aiohttp.ClientConnectorError):
        return RunnerGone(runner.reason())
    return died or Refused(500, f"the answer broke off: {error}" if error else "the answer broke off", remedy=_AGAIN)
