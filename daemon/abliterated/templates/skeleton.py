"""What a Jinja template says, learnt: conversations of marked words are rendered, and what stands between the marks is
kept. Most published templates are no more than such pieces of text around roles, tools, calls and thoughts.

A skeleton is believed only where it renders every conversation of a set exactly as the template does (`matches`).
Does not know Go. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from abliterated.templates.rendering import BEGIN, TemplateRefuses, render

Message = Mapping[str, Any]

_SYSTEM, _NAME, _THOUGHT = "qqsystemqq", "qqnameqq", "qqthoughtqq"
_USERS: Final = ("qqaskaqq", "qqaskbqq", "qqaskcqq")
_ANSWERS: Final = ("qqsayaqq", "qqsaybqq")
_RESULTS: Final = ("qqgotaqq", "qqgotbqq")
_ARGUMENTS: Final[dict[str, Any]] = {"qqkeyqq": "qqvalueqq"}
_TOOL: Final[dict[str, Any]] = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "qqpurposeqq",
        "parameters": {
            "type": "object",
            "required": ["qqkeyqq"],
            "properties": {"qqkeyqq": {"type": "string", "description": "qqhintqq"}},
        },
    },
}


class NotSo(Exception):
    """The template is no such skeleton."""


@dataclass(frozen=True)
class Head:
    """What comes before the first user's message: texts around the system message and the tools, in their order.

    `parts`: "system" and "tools" as they come, with texts before, between and after; `joint`: between two tools.
    """

    texts: tuple[str, ...]
    parts: tuple[str, ...] = ()
    joint: str = ""


@dataclass(frozen=True)
class Calls:
    """One assistant's calls and their results. `first`, `joint`: before a call's name; `mid`: name to arguments."""

    first: str
    mid: str
    joint: str
    last: str
    result_before: str
    result_joint: str
    result_after: str
    json_result: bool  # a result is told as a JSON string
    whole_tool: bool  # a tool is told as it is, or only its function
    indent: int | None


@dataclass(frozen=True)
class Skeleton:
    """`heads`: by (a system message, tools). `swallows`: after those heads the first question has no `user[0]`, for it
    is in the head. `prompt`: what opens the answer. `thinks`: thoughts are split off, `thought`: and told again."""

    heads: Mapping[tuple[bool, bool], Head]
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str
    prompt_unthinking: str
    swallows: frozenset[tuple[bool, bool]] = frozenset()
    calls: Calls | None = None
    thought: tuple[str, str] | None = None
    thinks: bool = False


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def asked(count: int) -> Message:
    function = {"name": _NAME, "arguments": _ARGUMENTS}
    calls = [{"id": f"qqcallqq{number}", "type": "function", "function": function} for number in range(count)]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def got(number: int) -> Message:
    return {"role": "tool", "tool_call_id": f"qqcallqq{number}", "name": _NAME, "content": _RESULTS[number]}


def learn(jinja: str) -> Skeleton | None:
    """The skeleton of a template, with tools where they fit one, without where only the rest does; None where nothing
    does."""
    try:
        plain = _plain(jinja)
        if not matches(plain, jinja, conversations(tools=False)):
            # Without thoughts it tells more than another opening: then thoughts can't be switched off.
            plain = replace(plain, prompt_unthinking=plain.prompt)
            if not matches(plain, jinja, conversations(tools=False)):
                return None
    except (NotSo, TemplateRefuses):
        return None
    try:
        whole = _with_tools(jinja, plain)
        if matches(whole, jinja, conversations(tools=True)):
            return whole
    except (NotSo, TemplateRefuses):
        pass
    return plain


def conversations(*, tools: bool) -> list[tuple[list[Message], list[Message]]]:
    """What a skeleton has to render as its template does: messages, and tools."""
    one, two, three = (user(text) for text in _USERS)
    first, second = (said(text) for text in _ANSWERS)
    system: Message = {"role": "system", "content": _SYSTEM}
    talks: list[list[Message]] = [[one], [system, one], [one, first, two], [system, one, first, two, second, three]]
    if not tools:
        return [(talk, []) for talk in talks]
    talks += [
        [one, asked(1), got(0)],
        [one, asked(1), {**got(0), "content": 'a "quoted" line\nand one more'}],
        [system, one, asked(2), got(0), got(1)],
        [one, asked(1), got(0), first, two],
        [system, one, first, two, asked(1), got(0)],
    ]
    return [(talk, [_TOOL]) for talk in talks] + [(talks[-1], [_TOOL, _TOOL])]


def matches(skeleton: Skeleton, jinja: str, talks: Sequence[tuple[list[Message], list[Message]]]) -> bool:
    thinking = (True, False) if skeleton.prompt_unthinking != skeleton.prompt else (True,)
    for talk, tools in talks:
        for think in thinking:
            try:
                wanted = _render(jinja, talk, tools, think=think)
            except TemplateRefuses:  # there is nothing to be equal to
                continue
            if speak(skeleton, talk, tools, think=think) != wanted:
                return False
    return True


def speak(skeleton: Skeleton, talk: Sequence[Message], tools: Sequence[Message] = (), *, think: bool = True) -> str:
    """What the Go template made of a skeleton renders, told in Python."""
    calls = skeleton.calls
    system = talk[0]["content"] if talk[0]["role"] == "system" else ""
    head = skeleton.heads[bool(system), bool(tools)]
    values = {"system": system, "tools": head.joint.join(_tool_text(tool, calls) for tool in tools) if calls else ""}
    text = head.texts[0] + "".join(values[part] + after for part, after in zip(head.parts, head.texts[1:], strict=True))
    turns = [message for message in talk if message["role"] != "system"]
    for place, message in enumerate(turns):
        match message["role"]:
            case "user":
                bare = place == 0 and (bool(system), bool(tools)) in skeleton.swallows
                text += ("" if bare else skeleton.user[0]) + message["content"] + skeleton.user[1]
            case "assistant" if message.get("tool_calls") and calls:
                text += skeleton.assistant[0] + message["content"]
                for number, call in enumerate(message["tool_calls"]):
                    text += (calls.joint if number else calls.first) + call["function"]["name"]
                    text += calls.mid + json.dumps(call["function"]["arguments"], ensure_ascii=False)
                text += calls.last
            case "assistant":
                text += skeleton.assistant[0] + message["content"] + skeleton.assistant[1]
            case "tool" if calls:
                follows = place > 0 and turns[place - 1]["role"] == "tool"
                ends = place + 1 == len(turns) or turns[place + 1]["role"] != "tool"
                content = json.dumps(message["content"])[1:-1] if calls.json_result else message["content"]
                text += (calls.result_joint if follows else calls.result_before) + content
                text += calls.result_after if ends else ""
    return text + (skeleton.prompt if think else skeleton.prompt_unthinking)


def _tool_text(tool: Message, calls: Calls) -> str:
    told = tool if calls.whole_tool else tool["function"]
    return json.dumps(told, ensure_ascii=False, indent=calls.indent)


def _render(
    jinja: str, talk: Sequence[Message], tools: Sequence[Message] = (), *, generate: bool = True, think: bool = True
) -> str:
    import jinja2

    undated = jinja2.Undefined()  # no template shall keep the day it was learnt for today's
    try:
        text = render(jinja, talk, tools=tools or None, generate=generate, enable_thinking=think, strftime_now=undated)
    except TemplateRefuses:
        text = render(jinja, talk, tools=tools or None, generate=generate, enable_thinking=think)
    return text.removeprefix(BEGIN)  # an engine begins every prompt with it by itself


def _between(text: str, before: str, after: str) -> str:
    """What stands between the last `before` and the first `after` behind it; an empty mark is the text's end."""
    start = text.rindex(before) + len(before) if before in text else -1
    end = (text.find(after, start) if after else len(text)) if start >= 0 else -1
    if end < 0:
        raise NotSo
    return text[start:end]


def _minus(text: str, *, start: str = "", end: str = "") -> str:
    if not text.startswith(start) or not text.endswith(end) or len(text) < len(start) + len(end):
        raise NotSo
    return text[len(start) : len(text) - len(end)]


def _shared(end: str, talk: str, mark: str) -> str:
    """What ends a message, be it the last or not: some templates write more after the last."""
    follows = talk.partition(mark)[2]
    length = next((at for at, (one, two) in enumerate(zip(end, follows, strict=False)) if one != two), len(end))
    return re.sub(r"<[^<>]*$", "", end[:length])


def _plain(jinja: str) -> Skeleton:
    first, second = user(_USERS[0]), user(_USERS[1])
    answer = said(_ANSWERS[0])
    talk = _render(jinja, [first, answer, second])
    user_after = _shared(_between(_render(jinja, [first], generate=False), _USERS[0], ""), talk, _USERS[0])
    assistant_before = _minus(_between(talk, _USERS[0], _ANSWERS[0]), start=user_after)
    assistant_after = _shared(
        _between(_render(jinja, [first, answer], generate=False), _ANSWERS[0], ""), talk, _ANSWERS[0]
    )
    user_before = _minus(_between(talk, _ANSWERS[0], _USERS[1]), start=assistant_after)
    prompts = [
        _minus(_between(_render(jinja, [first], think=think), _USERS[0], ""), start=user_after)
        for think in (True, False)
    ]
    alone = _render(jinja, [first]).partition(_USERS[0])[0]
    heads = {(False, False): Head((_minus(alone, end=user_before),))}
    swallows: frozenset[tuple[bool, bool]] = frozenset()
    try:
        told = _render(jinja, [{"role": "system", "content": _SYSTEM}, first]).partition(_USERS[0])[0]
    except TemplateRefuses:  # no system messages: they begin the first question, as llama.cpp has it
        heads[True, False], swallows = Head((alone, "\n\n"), ("system",)), frozenset({(True, False)})
    else:
        before, found, after = told.partition(_SYSTEM)
        if not found:
            raise NotSo
        heads[True, False] = Head((before, _minus(after, end=user_before)), ("system",))
    skeleton = Skeleton(
        heads, (user_before, user_after), (assistant_before, assistant_after), prompts[0], prompts[1],
        swallows, thinks="<think>" in jinja and "</think>" in jinja,
    )  # fmt: skip
    return replace(skeleton, thought=_thought(jinja, skeleton)) if skeleton.thinks else skeleton


def _thought(jinja: str, skeleton: Skeleton) -> tuple[str, str] | None:
    """What goes around a thought in the answer that follows the last question."""
    message = {**asked(1), "reasoning_content": _THOUGHT}
    try:
        text = _render(jinja, [user(_USERS[0]), message, got(0)], [_TOOL])
        before = _minus(_between(text, _USERS[0], _THOUGHT), start=skeleton.user[1] + skeleton.assistant[0])
        after = _between(text, _THOUGHT, "</think>") + "</think>"
    except (NotSo, TemplateRefuses):
        return None
    tail = text[text.index(_THOUGHT) + len(_THOUGHT) + len(after) :]
    blank = tail[: len(tail) - len(tail.lstrip("\n"))]
    return (before, after + blank) if before.strip() == "<think>" else None


def _with_tools(jinja: str, plain: Skeleton) -> Skeleton:
    form, whole, indent = _form(jinja)
    heads = dict(plain.heads)
    swallows = set(plain.swallows)
    for system in (False, True):
        talk: list[Message] = [{"role": "system", "content": _SYSTEM}] if system else []
        one, two = (
            _render(jinja, [*talk, user(_USERS[0])], [_TOOL] * count).partition(_USERS[0])[0] for count in (1, 2)
        )
        if form not in one:
            raise NotSo
        inside = not one.endswith(plain.user[0])
        swallows |= {(system, True)} if inside else set()
        body = one if inside else _minus(one, end=plain.user[0])
        heads[system, True] = _head(body, form, system, two.split(form)[1])
    first, mid, last = _calls(jinja, plain)
    arguments = json.dumps(_ARGUMENTS)
    joint, result_joint = first, ""
    if not _one_call_only(jinja):
        both = _render(jinja, [user(_USERS[0]), asked(2), got(0), got(1)], [_TOOL])
        spoken = both[both.index(_USERS[0]) :]
        joint = spoken.split(arguments)[1].partition(_NAME)[0]
        result_joint = _between(spoken, _RESULTS[0], _RESULTS[1])
    once = _render(jinja, [user(_USERS[0]), asked(1), got(0)], [_TOOL])
    result_after = _minus(_between(once, _RESULTS[0], ""), end=plain.prompt)
    result_before = _minus(_between(once, arguments, _RESULTS[0]), start=last)
    result_joint = result_joint or result_after + result_before
    json_result = result_before.endswith('"') and result_after.startswith('"')
    calls = Calls(first, mid, joint, last, result_before, result_joint, result_after, json_result, whole, indent)
    return replace(plain, heads=heads, swallows=frozenset(swallows), calls=calls)


def _one_call_only(jinja: str) -> bool:
    try:
        return _render(jinja, [user(_USERS[0]), asked(2), got(0), got(1)], [_TOOL]).count(json.dumps(_ARGUMENTS)) < 2
    except TemplateRefuses:
        return True


def _form(jinja: str) -> tuple[str, bool, int | None]:
    """How a tool is told: as JSON of all of it or of its function, on one line or indented."""
    text = _render(jinja, [user(_USERS[0])], [_TOOL])
    for whole in (True, False):
        for indent in (None, 4, 2):
            form = json.dumps(_TOOL if whole else _TOOL["function"], indent=indent)
            if form in text:
                return form, whole, indent
    raise NotSo


def _head(body: str, form: str, system: bool, joint: str) -> Head:
    before, _, after = body.partition(form)
    if not system:
        return Head((before, after), ("tools",), joint)
    if _SYSTEM in before:
        start, _, middle = before.partition(_SYSTEM)
        return Head((start, middle, after), ("system", "tools"), joint)
    middle, found, end = after.partition(_SYSTEM)
    if not found:
        raise NotSo
    return Head((before, middle, end), ("tools", "system"), joint)


def _calls(jinja: str, plain: Skeleton) -> tuple[str, str, str]:
    """Before the name, name to arguments, and after the arguments of a single call."""
    text = _render(jinja, [user(_USERS[0]), asked(1)], [_TOOL], generate=False)
    spoken = text[text.index(_USERS[0]) :]
    # The template may begin the last answer with an empty thought, so the beginning is read where others follow.
    follows = _render(jinja, [user(_USERS[0]), asked(1), got(0)], [_TOOL])
    begun = follows[follows.index(_USERS[0]) :]
    first = _minus(_between(begun, _USERS[0], _NAME), start=plain.user[1] + plain.assistant[0])
    arguments = json.dumps(_ARGUMENTS)
    return first, _between(begun, _NAME, arguments), _between(spoken, arguments, "")
