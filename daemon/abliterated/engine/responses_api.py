"""OpenAI's Responses as Ollama serves them; nothing is kept.

Does not know: the store, llama.cpp, the shape of an answer (`shapes.responses`).
"""

from __future__ import annotations

from contextlib import aclosing

from aiohttp import web

from abliterated.engine import options
from abliterated.engine.ollama_api import SERVICE
from abliterated.engine.replies import answer, named_sse, read
from abliterated.engine.service import Clock, Question
from abliterated.shapes.openai import read_think
from abliterated.shapes.refusals import Refused
from abliterated.shapes.responses import Reply, ResponsesRequest, events, form, read_items, read_tool, settings


async def responses(http: web.Request) -> web.StreamResponse:
    request = await read(http, ResponsesRequest)
    service = http.app[SERVICE]
    if request.previous_response_id or request.conversation or request.background:
        raise Refused(400, "nothing is kept between requests", remedy="Send the whole conversation as `input`")
    opened = service.model(request.model)
    talk = read_items(request)
    if not talk:
        raise Refused(400, "[] is too short - 'input'")
    question = Question(
        model=opened,
        asked=request.model or "",
        messages=talk,
        tools=[read_tool(tool) for tool in request.tools or []],
        think=read_think((request.reasoning or {}).get("effort")),
        form=form(request),
        settings=options.merge(opened.parameters, settings(request)),
    )
    question.check("chat")
    async with aclosing(service.answer(question, Clock())) as pieces:
        told = events(pieces, Reply(request, question.asked))
        if request.stream:
            return await named_sse(http, told)
        *_, (_, last) = [event async for event in told]
        return answer(last["response"])
