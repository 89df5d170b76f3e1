"""OpenAI's routes as Ollama serves them: models, chat completions, completions, embeddings.

Does not know: the store's layout, llama.cpp. Like Ollama's, it ignores tool_choice and has temperature and top_p at 1
unless told.
"""

from __future__ import annotations

import base64
import struct
from contextlib import aclosing
from typing import Any

import msgspec
from aiohttp import web

from abliterated.engine import options
from abliterated.engine.ollama_api import SERVICE
from abliterated.engine.replies import answer, read, sse
from abliterated.engine.service import Clock, Question
from abliterated.engine.store import Stored
from abliterated.shapes import openai
from abliterated.shapes.openai import (
    ChatCompletionRequest,
    ChatShape,
    CompletionRequest,
    Shape,
    TextShape,
    read_form,
    read_message,
    read_think,
    settings,
)
from abliterated.shapes.refusals import Refused
from abliterated.shapes.talk import Message


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
        settings=options.merge(opened.parameters, settings(request)),
        logprobs=bool(request.logprobs),
        top_logprobs=request.top_logprobs or 0,
    )
    question.check("chat")
    return await _respond(http, request, question, ChatShape())


async def completions(http: web.Request) -> web.StreamResponse:
    request = await read(http, CompletionRequest)
    service = http.app[SERVICE]
    opened = service.model(request.model)
    texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt or []
    if len(texts) != 1:
        raise Refused(400, "give one prompt, a string", remedy="Send a request for each of several")
    question = Question(
        model=opened,
        asked=request.model or "",
        messages=[Message("user", texts[0])] if opened.header.chat_template else (),
        prompt=None if opened.header.chat_template else texts[0],
        settings=options.merge(opened.parameters, settings(request)),
    )
    question.check("generate")
    return await _respond(http, request, question, TextShape())


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


async def _respond(
    http: web.Request, request: CompletionRequest, question: Question, shape: Shape
) -> web.StreamResponse:
    service = http.app[SERVICE]
    async with aclosing(service.answer(question, Clock())) as pieces:
        if not request.stream:
            return answer(await openai.whole(shape, question.asked, pieces))
        usage = bool(request.stream_options and request.stream_options.include_usage)
        return await sse(http, openai.chunks(shape, question.asked, pieces, usage=usage))
