"""OpenAI's routes as Ollama serves them: models, chat completions, completions, embeddings.

Does not know: the store's layout, llama.cpp. Like Ollama's, it ignores tool_choice and has temperature and top_p at 1
unless told.
"""

from __future__ import annotations

import base64
import json
import secrets
import struct
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from aiohttp import web

from abliterated.engine import chat, options
from abliterated.engine.completion import End, Piece, ToolCall
from abliterated.engine.errors import Refused
from abliterated.engine.ollama_api import SERVICE
from abliterated.engine.replies import answer, read, sse
from abliterated.engine.service import Clock, Question, Service
from abliterated.engine.store import Stored


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


class EmbeddingsRequest(msgspec.Struct, frozen=True):
    model: str | None = None
    input: str | list[str] | None = None
    encoding_format: str | None = None
    dimensions: int | None = None


async def models(http: web.Request) -> web.Response:
    return answer({"object": "list", "data": [_card(stored) for stored in http.app[SERVICE].store.all()]})


async def model(http: web.Request) -> web.Response:
    return answer(_card(http.app[SERVICE].store.get(http.match_info["model"])))


def _card(stored: Stored) -> dict[str, Any]:
    return {
        "id": stored.name.short(),
        "object": "model",
        "created": int(stored.modified),
        "owned_by": stored.name.namespace,
    }


async def chat_completions(http: web.Request) -> web.StreamResponse:
    request = await read(http, ChatCompletionRequest)
    service = http.app[SERVICE]
    if not request.messages:
        raise Refused(400, "[] is too short - 'messages'")
    opened = service.model(request.model)
    question = Question(
        model=opened,
        asked=request.model or "",
        messages=[read_message(message) for message in request.messages],
        tools=request.tools or (),
        think=read_think((request.reasoning or {}).get("effort") or request.reasoning_effort),
        form=read_form(request.response_format),
        settings=options.merge(opened.parameters, _options(request)),
        logprobs=bool(request.logprobs),
        top_logprobs=request.top_logprobs or 0,
    )
    question.check("chat")
    return await _respond(http, request, question, _ChatShape())


async def completions(http: web.Request) -> web.StreamResponse:
    request = await read(http, CompletionRequest)
    service = http.app[SERVICE]
    opened = service.model(request.model)
    texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt or []
    if len(texts) != 1:
        raise Refused(400, "give one prompt, a string")
    question = Question(
        model=opened,
        asked=request.model or "",
        messages=[chat.Message("user", texts[0])] if opened.header.chat_template else (),
        prompt=None if opened.header.chat_template else texts[0],
        settings=options.merge(opened.parameters, _options(request)),
    )
    question.check("generate")
    return await _respond(http, request, question, _TextShape())


async def embeddings(http: web.Request) -> web.Response:
    request = await read(http, EmbeddingsRequest)
    service = http.app[SERVICE]
    opened = service.model(request.model)
    texts = [request.input] if isinstance(request.input, str) else request.input or []
    if not texts:
        raise Refused(400, "invalid input")
    vectors, tokens = await service.embed(opened, texts, dict(opened.parameters), options.KEEP_ALIVE, clock=Clock())
    if request.dimensions:
        vectors = [vector[: request.dimensions] for vector in vectors]
    packed = request.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _pack(vector) if packed else vector}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return answer({"object": "list", "data": data, "model": request.model, "usage": usage})


def _pack(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _options(request: CompletionRequest) -> dict[str, Any]:
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


def read_message(message: dict[str, Any]) -> chat.Message:
    """OpenAI's message as Ollama's: content parts joined, arguments parsed."""
    content = message.get("content")
    images: list[str] = []
    if isinstance(content, list):
        texts = []
        for part in content:
            if part.get("type") == "text":
                texts.append(str(part.get("text", "")))
            elif part.get("type") == "image_url":
                url = part.get("image_url")
                url = url.get("url", "") if isinstance(url, dict) else str(url)
                if not url.startswith("data:"):
                    raise Refused(400, "invalid image input: only data: URLs are read")
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
        calls.append(chat.Call(chat.Function(str(function.get("name", "")), arguments), call.get("id")))
    return chat.Message(
        role=str(message.get("role", "")),
        content=content,
        thinking=message.get("reasoning") or message.get("reasoning_content"),
        images=images or None,
        tool_calls=calls or None,
        tool_name=message.get("name"),
        tool_call_id=message.get("tool_call_id"),
    )


class _ChatShape:
    object = "chat.completion"
    prefix = "chatcmpl"

    def delta(self, piece: Piece) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant", "content": piece.content}
        if piece.thinking:
            delta["reasoning"] = piece.thinking
        if piece.calls:
            delta["tool_calls"] = [_told(call, index) for index, call in enumerate(piece.calls)]
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


class _TextShape:
    object = "text_completion"
    prefix = "cmpl"

    def delta(self, piece: Piece) -> dict[str, Any]:
        return {"index": 0, "text": piece.content, "finish_reason": None}

    def last(self, reason: str) -> dict[str, Any]:
        return {"index": 0, "text": "", "finish_reason": reason}

    def whole(self, pieces: list[Piece], reason: str) -> dict[str, Any]:
        return {"index": 0, "text": "".join(piece.content for piece in pieces), "finish_reason": reason}


def _told(call: ToolCall, index: int) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call.id, "index": index, "type": "function", "function": {"name": call.name, "arguments": arguments}}


async def _respond(
    http: web.Request, request: CompletionRequest, question: Question, shape: _ChatShape | _TextShape
) -> web.StreamResponse:
    service = http.app[SERVICE]
    head = {
        "id": f"{shape.prefix}-{secrets.randbelow(1000)}",
        "object": shape.object,
        "created": int(time.time()),
        "model": question.asked,
        "system_fingerprint": "fp_ollama",
    }
    if not request.stream:
        return await _whole(service, question, shape, head)
    if shape.object == "chat.completion":
        head["object"] = "chat.completion.chunk"
    usage = bool(request.stream_options and request.stream_options.include_usage)
    chunks = _chunks(service, question, shape, head, usage)
    async with aclosing(chunks):
        return await sse(http, chunks)


async def _whole(
    service: Service, question: Question, shape: _ChatShape | _TextShape, head: dict[str, Any]
) -> web.Response:
    pieces: list[Piece] = []
    end = End("stop")
    async with aclosing(service.answer(question, Clock())) as events:
        async for event in events:
            if isinstance(event, End):
                end = event
            else:
                pieces.append(event)
    return answer({**head, "choices": [shape.whole(pieces, _reason(end, pieces))], "usage": _usage(end)})


async def _chunks(
    service: Service, question: Question, shape: _ChatShape | _TextShape, head: dict[str, Any], usage: bool
) -> AsyncGenerator[dict[str, Any], None]:
    pieces: list[Piece] = []
    empty = {"usage": None} if usage else {}
    async with aclosing(service.answer(question, Clock())) as events:
        async for event in events:
            if isinstance(event, End):
                yield {**head, "choices": [shape.last(_reason(event, pieces))], **empty}
                if usage:
                    yield {**head, "choices": [], "usage": _usage(event)}
            else:
                if event.calls:
                    pieces.append(event)
                yield {**head, "choices": [shape.delta(event)], **empty}


def _reason(end: End, pieces: list[Piece]) -> str:
    return "tool_calls" if any(piece.calls for piece in pieces) and end.reason == "stop" else end.reason


def _usage(end: End) -> dict[str, int]:
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.tokens,
        "total_tokens": end.prompt_tokens + end.tokens,
    }
