"""Anthropic's Messages as Ollama serves them.

Does not know: the store, llama.cpp, the shape of an answer (`shapes.messages`). `tool_choice` is ignored, as Ollama
ignores it.
"""

from __future__ import annotations

from contextlib import aclosing

from aiohttp import web

from abliterated.engine import options
from abliterated.engine.ollama_api import SERVICE
from abliterated.engine.replies import answer, named_sse, read
from abliterated.engine.service import Clock, Question
from abliterated.shapes.messages import (
    MessagesRequest,
    Reply,
    check,
    events,
    read_messages,
    read_think,
    read_tool,
    settings,
)


async def messages(http: web.Request) -> web.StreamResponse:
    request = await read(http, MessagesRequest)
    service = http.app[SERVICE]
    check(request)
    opened = service.model(request.model)
    question = Question(
        model=opened,
        asked=request.model or "",
        messages=read_messages(request),
        tools=[read_tool(tool) for tool in request.tools or []],
        think=read_think(request) if "thinking" in opened.capabilities else None,
        settings=options.merge(opened.parameters, settings(request)),
    )
    question.check("chat")
    reply = Reply(question.asked)
    async with aclosing(service.answer(question, Clock())) as pieces:
        told = events(pieces, reply)
        if request.stream:
            return await named_sse(http, told)
        async for _ in told:
            pass
        return answer(reply.whole())
