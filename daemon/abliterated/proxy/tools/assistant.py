"""Help where an engine can't do tools or thinking for an abliterated model: decides, asks in another way, tells.

Two ways. *Rendered*: the prompt is made by the model's own chat template (or our variant of it) and sent as a raw
completion. *Told*: tools are told in words in an ordinary chat, where the template can't be read here, where the
engine would lose the marks of a call on the way, or where there are images, which only a chat takes.

Does not know: the relay (it meets it in `proxy.assist` only), jobs, registration.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, Final, Literal

import msgspec

from abliterate.contract.names import parse_name
from abliterated.proxy.assist import Asked, Outlet
from abliterated.proxy.tools import asking as asks
from abliterated.proxy.tools import schema, telling, told
from abliterated.proxy.tools import upstream as engine
from abliterated.proxy.tools.asking import APIS, Asking
from abliterated.proxy.tools.dialects import HERMES, MARKLESS
from abliterated.proxy.tools.helper import Render
from abliterated.proxy.tools.knowing import Knowledge, Known
from abliterated.proxy.tools.reading import Reader
from abliterated.proxy.tools.renderer import CannotRender, Renderer
from abliterated.shapes.refusals import Refused
from abliterated.shapes.talk import End, Message, Piece

log = logging.getLogger(__name__)

Help = Literal["off", "needed", "any", "always"]
More = Literal["tool_choice", "parallel_tool_calls", "thinking_history"]
_LONG: Final = 1 << 18
_AGAIN: Final = "Ask again; its log may tell why"
_PASSED_ON: Final = frozenset({b"host", b"origin", b"authorization", b"user-agent"})
_PASSED_BACK: Final = ("access-control-", "vary", "www-authenticate")


class _Plan(msgspec.Struct):
    """A request as it goes on, and how its answer is read."""

    path: str
    body: dict[str, Any]
    reader: Reader
    seed: str = ""  # what the prompt says already of the answer


class Assist:
    """`proxy.assist.Assistant`. `help`: where an engine lacks it; "any": for models never taught to call, too;
    "always": for all (tests). `more`: what engines drop and a person wants all the same."""

    def __init__(
        self, *, help: Help = "needed", more: frozenset[More] = frozenset(), renderer: Renderer | None = None
    ) -> None:
        self._help = help
        self._more = more
        self.renderer = renderer or Renderer()
        self.knowledge = Knowledge(self.renderer)
        self._distrusted: set[str] = set()

    def trust(self, model: str, *, tools: bool) -> None:
        """What certification found: whether `model` gets the tools its engine says it can use."""
        name = parse_name(model).key()
        (self._distrusted.discard if tools else self._distrusted.add)(name)

    def wanted(self, route: str, model: str) -> bool:
        """`proxy.assist.Wanted`."""
        return route in APIS and self._help != "off"

    async def close(self) -> None:
        await self.renderer.close()

    async def __call__(self, asked: Asked, outlet: Outlet) -> bool:
        if asked.head.minor == 0 or not self._might_matter(asked.content):
            return False
        try:
            if len(asked.content) > _LONG:  # images, mostly: nobody else shall wait for that
                asking = await asyncio.to_thread(asks.read, asked.route, asked.content)
            else:
                asking = asks.read(asked.route, asked.content)
        except Refused:
            return False  # the engine says it better
        if asking.peculiar:
            return False
        headers = _headers(asked)
        try:
            known = await self.knowledge.of(asked.upstream, asking.model, headers)
            plan = await self._plan(asking, known) if known is not None else None
        except engine.Broken:
            return False  # the relay has an answer for that
        if plan is None:
            return False
        await self._answer(asking, plan, asked.upstream, headers, outlet)
        return True

    @staticmethod
    def _might_matter(body: bytes) -> bool:
        return any(word in body for word in (b'"tools"', b'"think', b'"reasoning'))

    # what is to be done

    async def _plan(self, asking: Asking, known: Known) -> _Plan | None:
        able = known.capabilities if self._help != "always" else frozenset[str]()
        if self._distrusted and parse_name(asking.model).key() in self._distrusted:
            able -= {"tools"}
        tools = asking.tools
        if asking.choice == "none" and "tool_choice" in self._more:
            tools = []
        thinks = asking.think not in (None, False)
        lacks_tools = bool(asking.tools) and ("tools" not in able or bool(known.loses & asking.needs))
        lacks_thinking = thinks and "thinking" not in able
        if not (lacks_tools or lacks_thinking or self._wants_more(asking)):
            return None
        dialect = known.dialect
        renders = bool(known.jinja) and not asking.images
        if renders and (not tools or (dialect and known.trained)) and (not lacks_thinking or known.thoughts):
            try:
                return await self._rendered(asking, known, tools)
            except CannotRender as error:
                log.warning("%s: %s", asking.model, error, extra={"action": "assist_render"})
        if not tools or not (known.trained or self._help in ("any", "always")):
            return None
        return self._told(asking, known, tools, think=not lacks_thinking)

    def _wants_more(self, asking: Asking) -> bool:
        """Something engines drop, and a person has opted for."""
        return (
            ("tool_choice" in self._more and bool(asking.tools) and asking.choice != "auto")
            or ("parallel_tool_calls" in self._more and bool(asking.tools) and not asking.several)
            or ("thinking_history" in self._more and any(message.thinking for message in asking.messages))
        )

    async def _rendered(self, asking: Asking, known: Known, tools: list[dict[str, Any]]) -> _Plan:
        assert known.learnt is not None
        words = known.learnt.words
        values: dict[str, Any] = {"bos_token": words.bos, "eos_token": words.eos}
        values["enable_thinking"] = asking.think is not False
        if isinstance(asking.think, str):
            values["reasoning_effort"] = asking.think
        prompt = await self.renderer.render(Render(known.jinja, _talk(asking, known), tools, values))
        if words.begins and words.bos:
            prompt = prompt.removeprefix(words.bos)
        thoughts, dialect = known.thoughts, known.dialect if tools else None
        thinking = thoughts is not None and prompt.rstrip().endswith(thoughts[0].strip())
        several = asking.several or "parallel_tool_calls" not in self._more
        reader = Reader(
            (dialect,) if dialect else (), thoughts, schema.index(tools), thinking=thinking, several=several
        )
        seed = ""
        if dialect is not None and "tool_choice" in self._more and asking.choice not in ("auto", "none"):
            name = asking.choice[1:] or (tools[0]["function"]["name"] if len(tools) == 1 else "")
            seed = (f"{thoughts[1]}\n\n" if thinking and thoughts else "") + (
                "" if dialect.bare or not dialect.opens else dialect.opens[0]
            )
            seed += dialect.seed % name if name and dialect.seed else ""
        body = self._common(asking) | {"prompt": prompt + seed, "raw": True}
        return _Plan("/api/generate", body, reader, seed)

    def _told(self, asking: Asking, known: Known, tools: list[dict[str, Any]], *, think: bool) -> _Plan:
        several = asking.several or "parallel_tool_calls" not in self._more
        choice = asking.choice if "tool_choice" in self._more else "auto"
        roles = "system" in known.jinja if known.jinja else True
        messages = told.tell(asking.messages, tools, system=known.system, choice=choice, several=several, roles=roles)
        body = self._common(asking) | {"messages": [_as_ollama(message) for message in messages]}
        if think and asking.think is not None:
            body["think"] = asking.think
        # What it was trained to say it may say all the same.
        spoken = [HERMES, *([known.spoken] if known.spoken else []), MARKLESS]
        reader = Reader(spoken, known.thoughts, schema.index(tools), several=several)
        return _Plan("/api/chat", body, reader)

    def _common(self, asking: Asking) -> dict[str, Any]:
        body: dict[str, Any] = {"model": asking.model, "stream": True, "options": asking.options}
        if asking.keep_alive is not None:
            body["keep_alive"] = asking.keep_alive
        if asking.form is not None:
            body["format"] = asking.form
        return body

    # asking and telling

    async def _answer(
        self, asking: Asking, plan: _Plan, upstream: str, headers: Mapping[str, str], outlet: Outlet
    ) -> None:
        back: dict[str, str] = {}
        costs: dict[str, int] = {}
        pieces = self._pieces(plan, upstream, headers, back, costs)
        async with aclosing(pieces):
            await telling.tell(asking, pieces, outlet, lambda end: costs, lambda: back)

    async def _pieces(
        self, plan: _Plan, upstream: str, headers: Mapping[str, str], back: dict[str, str], costs: dict[str, int]
    ) -> AsyncGenerator[Piece | End, None]:
        """The answer as it comes. `back` and `costs` are filled on the way."""
        reader = plan.reader
        began = time.perf_counter_ns()
        try:
            async with engine.post(upstream, plan.path, plan.body, headers) as answer:
                back.update((name, value) for name, value in answer.headers if name.startswith(_PASSED_BACK))
                if answer.status != 200:
                    raise Refused(answer.status, _message(await answer.read()))
                for piece in reader.feed(plan.seed):
                    yield piece
                count = 0
                async for raw in answer.lines():
                    line = _decode(raw)
                    if line.error:
                        raise Refused(500, line.error)
                    text, thought = (line.response, line.thinking) if line.message is None else line.message.both
                    if thought:
                        yield Piece(thinking=thought)
                    for piece in reader.feed(text) if text else ():
                        yield piece
                    count += bool(text or thought)
                    if reader.done:
                        costs.update(total_duration=time.perf_counter_ns() - began, eval_count=count)
                        yield End("stop", tokens=count)
                        return
                    if line.done:
                        for piece in reader.finish(cut=line.done_reason == "length"):
                            yield piece
                        costs.update(line.costs)
                        yield End(line.done_reason or "stop", line.prompt_eval_count, line.eval_count)
                        return
                raise Refused(500, "the engine's answer broke off", remedy=_AGAIN)
        except engine.Broken as error:
            raise Refused(502, error.message, remedy=error.remedy) from error


class _Said(msgspec.Struct, frozen=True, gc=False):
    content: str = ""
    thinking: str = ""

    @property
    def both(self) -> tuple[str, str]:
        return self.content, self.thinking


class _Line(msgspec.Struct, frozen=True):
    """A line of Ollama's, of chat or generate."""

    response: str = ""
    thinking: str = ""
    message: _Said | None = None
    done: bool = False
    done_reason: str = ""
    error: str = ""
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0

    @property
    def costs(self) -> dict[str, int]:
        names = ("total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration")
        return {name: getattr(self, name) for name in (*names, "eval_count", "eval_duration")}


_decoder: Final = msgspec.json.Decoder(_Line)


def _decode(line: bytes) -> _Line:
    try:
        return _decoder.decode(line)
    except msgspec.MsgspecError as error:
        raise Refused(502, f"the engine's answer can't be read ({error})", remedy=_AGAIN) from error


def _headers(asked: Asked) -> dict[str, str]:
    """Of the client's, what its engine's own guards ask for."""
    return {
        name.decode("latin-1").title(): value.decode("latin-1")
        for name, value in asked.head.fields()
        if name in _PASSED_ON
    }


def _message(body: bytes) -> str:
    try:
        error = msgspec.json.decode(body)["error"]
    except (msgspec.DecodeError, KeyError, TypeError):
        return body.decode("utf-8", "replace")[:500]
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _talk(asking: Asking, known: Known) -> list[dict[str, Any]]:
    """The conversation as templates want it: the model's own beginning, then the request's."""
    asked: list[dict[str, Any]] = []
    waiting: list[tuple[str, str]] = []  # calls without a result yet: id and tool
    for number, message in enumerate(asking.messages):
        said: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.thinking:
            said |= {"reasoning_content": message.thinking, "thinking": message.thinking}
        if message.tool_calls:
            said["tool_calls"] = [
                {
                    "id": call.id or f"call_{number}_{place}",
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.arguments or {}},
                }
                for place, call in enumerate(message.tool_calls)
            ]
            waiting = [(call["id"], call["function"]["name"]) for call in said["tool_calls"]]
        if message.role == "tool":
            mine = [one for one in waiting if not message.tool_call_id or one[0] == message.tool_call_id]
            identity, name = mine[0] if mine else ("", "")
            waiting = [one for one in waiting if one not in mine[:1]]
            said |= {"tool_call_id": message.tool_call_id or identity, "name": message.tool_name or name}
        asked.append(said)
    if asking.messages and asking.messages[0].role == "system":
        return asked
    system = [{"role": "system", "content": known.system}] if known.system else []
    return [*system, *known.before, *asked]


def _as_ollama(message: Message) -> dict[str, Any]:
    said: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    return said | ({"images": message.images} if message.images else {})
