"""Requests read and answers written: JSON bodies, NDJSON and SSE streams.

A stream begins only with its first event, so that a refusal before it keeps its status; one after it becomes the last
line.
Does not know: what is asked, what is answered.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from abliterated.engine.errors import refusal
from abliterated.shapes.refusals import Refused, anthropic_shape, ollama_shape, openai_shape

T = TypeVar("T")
_encode = msgspec.json.Encoder().encode
_decoder = json.JSONDecoder()


async def read(request: web.Request, kind: type[T]) -> T:
    """The first JSON value of the body, whatever its Content-Type; unknown keys are ignored, as Ollama does."""
    if (request.content_length or 0) > request.client_max_size:  # told before half a gigabyte was read
        raise web.HTTPRequestEntityTooLarge(request.client_max_size)
    try:
        text = (await request.read()).decode().lstrip()
    except UnicodeDecodeError as error:
        raise Refused(400, f"invalid JSON: {error}") from error
    if not text:
        raise Refused(400, "missing request body")
    try:
        value, _ = _decoder.raw_decode(text)
        return msgspec.convert(value, kind)
    except (ValueError, RecursionError) as error:  # msgspec.ValidationError is a ValueError
        raise Refused(400, f"invalid JSON: {error}") from error


def answer(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=_encode(value), status=status, content_type="application/json", charset="utf-8")


async def ndjson(request: web.Request, events: AsyncIterator[Any]) -> web.StreamResponse:
    """One JSON object a line; an error after the first is a last line of its own."""
    first = await anext(events)
    response = await _open(request, "application/x-ndjson")
    try:
        await response.write(_encode(first) + b"\n")
        async for event in events:
            await response.write(_encode(event) + b"\n")
    except ConnectionError:
        raise  # nobody is listening
    except Exception as error:
        await response.write(_encode(ollama_shape(refusal(error))) + b"\n")
    await response.write_eof()
    return response


async def sse(request: web.Request, events: AsyncIterator[Any]) -> web.StreamResponse:
    """`data: {...}` events and `data: [DONE]`; an error after the first is an event with `error`, and no `[DONE]`."""
    first = await anext(events)
    response = await _open(request, "text/event-stream")
    try:
        await response.write(b"data: " + _encode(first) + b"\n\n")
        async for event in events:
            await response.write(b"data: " + _encode(event) + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
    except ConnectionError:
        raise
    except Exception as error:
        await response.write(b"data: " + _encode(openai_shape(refusal(error))) + b"\n\n")
    await response.write_eof()
    return response


async def named_sse(request: web.Request, events: AsyncIterator[tuple[str, Any]]) -> web.StreamResponse:
    """`event: name` and its data; an error after the first is an event named so, in Anthropic's shape, which OpenAI's
    clients read as well."""
    first = await anext(events)
    response = await _open(request, "text/event-stream")
    try:
        await response.write(_named(*first))
        async for name, event in events:
            await response.write(_named(name, event))
    except ConnectionError:
        raise
    except Exception as error:
        told = anthropic_shape(refusal(error))
        await response.write(_named("error", {**told, "message": told["error"]["message"], "code": None}))
    await response.write_eof()
    return response


def _named(name: str, event: Any) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + _encode(event) + b"\n\n"


async def _open(request: web.Request, kind: str) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": kind, "Cache-Control": "no-cache"})
    response.enable_chunked_encoding()
    await response.prepare(request)
    return response
