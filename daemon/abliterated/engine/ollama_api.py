"""Ollama's inference routes: generate, chat, embed, embeddings.

Does not know: the store's layout, llama.cpp.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import msgspec
from aiohttp import web

from abliterated.engine import options
from abliterated.engine.models import Model
from abliterated.engine.replies import answer, ndjson, read
from abliterated.engine.service import Clock, Question, Service
from abliterated.shapes import ollama
from abliterated.shapes.ollama import ChatRequest, Request, now
from abliterated.shapes.refusals import Refused
from abliterated.shapes.talk import End, Message

SERVICE = web.AppKey("service", Service)


class GenerateRequest(Request, frozen=True):
    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None
    images: list[str] | None = None


class EmbedRequest(msgspec.Struct, frozen=True):
    model: str | None = None
    input: str | list[str] | None = None
    prompt: str | None = None
    keep_alive: str | float | None = None
    options: dict[str, Any] | None = None
    truncate: bool | None = None
    dimensions: int | None = None


def question(request: Request, model: Model, **more: Any) -> Question:
    """What chat and generate have in common."""
    return Question(
        model=model,
        asked=request.model or "",
        think=request.think,
        form=request.format,
        settings=options.merge(model.parameters, request.options),
        keep=options.keep_alive(request.keep_alive),
        truncate=request.truncate is not False,
        logprobs=bool(request.logprobs),
        top_logprobs=request.top_logprobs or 0,
        **more,
    )


async def chat_route(http: web.Request) -> web.StreamResponse:
    request = await read(http, ChatRequest)
    service = http.app[SERVICE]
    model = service.model(request.model)
    asked = question(request, model, messages=request.messages or (), tools=request.tools or ())
    asked.check("chat")
    if not request.messages:
        return await _only_load(service, asked, {"message": {"role": "assistant", "content": ""}})
    return await _answer(http, request, asked, ollama.as_message, "content")


async def generate_route(http: web.Request) -> web.StreamResponse:
    request = await read(http, GenerateRequest)
    service = http.app[SERVICE]
    model = service.model(request.model)
    if request.raw and (request.system or request.template or request.context):
        raise Refused(400, "raw mode does not support template, system, or context")
    if request.context:
        raise Refused(
            400, "context is not supported by the embedded engine", remedy="Use /api/chat with the whole conversation"
        )
    if request.suffix:
        raise Refused(400, f"{model.stored.name.full()} does not support insert")
    bare = (request.template or "").replace(" ", "") in ("{{.Prompt}}", "{{-.Prompt-}}")
    if request.template and not bare and request.template != model.template:
        raise Refused(400, "a template in the request is not supported by the embedded engine", remedy="Use raw: true")
    prompt = request.prompt or ""
    if request.raw or bare or not model.header.chat_template:
        system = "" if request.raw or bare else request.system or model.system
        asked = question(request, model, prompt=f"{system}\n\n{prompt}" if system else prompt)
    else:
        turns = [Message("user", prompt, images=request.images)]
        if request.system:
            turns.insert(0, Message("system", request.system))
        asked = question(request, model, messages=turns)
    asked.check("generate")
    if not prompt and not request.images:
        return await _only_load(service, asked, {"response": ""})
    return await _answer(http, request, asked, lambda text: text, "response")


async def embed_route(http: web.Request) -> web.Response:
    request = await read(http, EmbedRequest)
    service, clock = http.app[SERVICE], Clock()
    model = service.model(request.model)
    keep = options.keep_alive(request.keep_alive)
    texts = [request.input] if isinstance(request.input, str) else request.input or []
    asked = options.merge(model.parameters, request.options)
    if not texts:
        if keep == 0:
            await service.pool.unload(model.path)
        return answer({"model": request.model, "embeddings": []})
    vectors, tokens = await service.embed(
        model, texts, asked, keep, truncate=request.truncate is not False, clock=clock
    )
    if request.dimensions:
        vectors = [_shorten(vector, request.dimensions) for vector in vectors]
    counters = clock.counters(End("stop", prompt_tokens=tokens))
    told = {key: counters[key] for key in ("total_duration", "load_duration", "prompt_eval_count")}
    return answer({"model": request.model, "embeddings": vectors, **told})


async def embeddings_route(http: web.Request) -> web.Response:
    request = await read(http, EmbedRequest)
    service = http.app[SERVICE]
    model = service.model(request.model)
    if not request.prompt:
        return answer({"embedding": []})
    vectors, _ = await service.embed(
        model,
        [request.prompt],
        options.merge(model.parameters, request.options),
        options.keep_alive(request.keep_alive),
        normalize=False,
        clock=Clock(),
    )
    return answer({"embedding": vectors[0]})


def _shorten(vector: list[float], length: int) -> list[float]:
    """The first components, of length one again."""
    cut = vector[:length]
    size = sum(value * value for value in cut) ** 0.5
    return [value / size for value in cut] if size else cut


async def _only_load(service: Service, asked: Question, empty: dict[str, Any]) -> web.Response:
    """No prompt: load the model, or with keep_alive 0 unload it."""
    reason = "load"
    if asked.keep == 0:
        await service.pool.unload(asked.model.path)
        reason = "unload"
    else:
        await service.load(asked.model, asked.settings, asked.keep)
    return answer({"model": asked.asked, "created_at": now(), **empty, "done": True, "done_reason": reason})


async def _answer(
    http: web.Request, request: Request, asked: Question, wrap: ollama.Wrap, key: str
) -> web.StreamResponse:
    service, clock = http.app[SERVICE], Clock()
    if request.debug:
        debug = {"rendered_template": await service.render(asked), "image_count": 0}
        return answer({"model": asked.asked, "created_at": now(), "_debug_info": debug})
    async with aclosing(service.answer(asked, clock)) as pieces:
        lines = ollama.lines(asked.asked, pieces, wrap, key, clock.counters)
        if request.stream is not False:
            return await ndjson(http, lines)
        return answer(await ollama.whole(lines, key))
