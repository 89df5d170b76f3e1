"""An assisted answer as bytes: a whole HTTP/1.1 answer in the API that was asked, streamed or not.

A stream begins with its first event, so that what goes wrong before keeps its status; after it, the error is told in
the stream. Does not know: where the answer comes from.
"""

from __future__ import annotations

import http
from collections.abc import AsyncGenerator, Callable, Mapping
from email.utils import formatdate
from typing import Any

import msgspec

from abliterated.proxy.assist import Outlet
from abliterated.proxy.tools.asking import Asking
from abliterated.shapes import messages as anthropic
from abliterated.shapes import ollama, openai, responses
from abliterated.shapes.refusals import Refused, anthropic_shape, ollama_shape, openai_shape
from abliterated.shapes.talk import End, Piece

Counters = Callable[[End], dict[str, int]]
_encode = msgspec.json.Encoder().encode


async def tell(
    asking: Asking,
    pieces: AsyncGenerator[Piece | End, None],
    outlet: Outlet,
    counters: Counters,
    headers: Callable[[], Mapping[str, str]],
) -> None:
    """`headers`: what the upstream said beside; asked for when the first piece is there."""
    events = _events(asking, pieces, counters)
    begun = False
    try:
        if not asking.stream:
            body = _encode(await _whole(asking, pieces, counters))
            await outlet.write(whole_answer(200, body, headers()))
            return
        async for event in events:
            if begun:
                await outlet.write(b"%x\r\n%b\r\n" % (len(event), event))
                continue
            begun = True
            await outlet.write(_stream_head(asking, headers()) + b"%x\r\n%b\r\n" % (len(event), event))
    except Refused as error:
        if not begun:
            await outlet.write(refusal(asking.api, error, headers()))
            return
        event = _late(asking, error)
        await outlet.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event))
        return
    finally:
        await events.aclose()
    end = b"data: [DONE]\n\n" if asking.api == "chat" else b""
    await outlet.write((b"%x\r\n%b\r\n" % (len(end), end) if end else b"") + b"0\r\n\r\n")


async def _events(
    asking: Asking, pieces: AsyncGenerator[Piece | End, None], counters: Counters
) -> AsyncGenerator[bytes, None]:
    """A streamed answer's events, encoded."""
    match asking.api:
        case "ollama":
            async for line in ollama.lines(asking.model, pieces, ollama.as_message, "content", counters):
                yield _encode(line) + b"\n"
        case "chat":
            options = asking.request.stream_options
            usage = bool(options and options.include_usage)
            async for chunk in openai.chunks(openai.ChatShape(), asking.model, pieces, usage=usage):
                yield b"data: " + _encode(chunk) + b"\n\n"
        case "responses":
            async for name, event in responses.events(pieces, responses.Reply(asking.request, asking.model)):
                yield b"event: " + name.encode() + b"\ndata: " + _encode(event) + b"\n\n"
        case "messages":
            async for name, event in anthropic.events(pieces, anthropic.Reply(asking.model)):
                yield b"event: " + name.encode() + b"\ndata: " + _encode(event) + b"\n\n"


async def _whole(asking: Asking, pieces: AsyncGenerator[Piece | End, None], counters: Counters) -> Any:
    match asking.api:
        case "ollama":
            return await ollama.whole(
                ollama.lines(asking.model, pieces, ollama.as_message, "content", counters), "content"
            )
        case "chat":
            return await openai.whole(openai.ChatShape(), asking.model, pieces)
        case "responses":
            told = responses.events(pieces, responses.Reply(asking.request, asking.model))
            *_, (_, last) = [event async for event in told]
            return last["response"]
        case "messages":
            reply = anthropic.Reply(asking.model)
            async for _ in anthropic.events(pieces, reply):
                pass
            return reply.whole()


def refusal(api: str, error: Refused, headers: Mapping[str, str]) -> bytes:
    """An error before the first byte, in the API's own shape."""
    return whole_answer(error.status, _encode(_shape(api, error)), headers)


def _shape(api: str, error: Refused) -> dict[str, Any]:
    if api == "ollama":
        return ollama_shape(error)
    return anthropic_shape(error) if api == "messages" else openai_shape(error)


def _late(asking: Asking, error: Refused) -> bytes:
    told = _encode(_shape(asking.api, error))
    match asking.api:
        case "ollama":
            return told + b"\n"
        case "chat":
            return b"data: " + told + b"\n\n"
    both = anthropic_shape(error)
    return b"event: error\ndata: " + _encode({**both, "message": both["error"]["message"], "code": None}) + b"\n\n"


def whole_answer(status: int, body: bytes, headers: Mapping[str, str]) -> bytes:
    kind = {"Content-Type": "application/json; charset=utf-8"}
    return _head(status, {**kind, **headers, "Content-Length": str(len(body))}) + body


def _stream_head(asking: Asking, headers: Mapping[str, str]) -> bytes:
    kind = "application/x-ndjson" if asking.api == "ollama" else "text/event-stream"
    more = {} if asking.api == "ollama" else {"Cache-Control": "no-cache"}
    return _head(200, {"Content-Type": kind, **more, **headers, "Transfer-Encoding": "chunked"})


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}", f"Date: {formatdate(usegmt=True)}"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode("latin-1")
