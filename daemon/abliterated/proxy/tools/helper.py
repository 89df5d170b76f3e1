"""The process that renders: a chat template is a stranger's program, which may never end and may eat all memory.

Reads one JSON question a line from stdin, answers each with one line on stdout; it ends with its input. A template's
output is bounded, and so is the memory of the process. Does not know: who asks, engines.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec

from abliterate.contract.errors import AbliteratedError
from abliterated.proxy.tools.vocabulary import Words, read_words

MEMORY: Final = 1 << 30
LONGEST_PROMPT: Final = 64 << 20


class Learn(msgspec.Struct, frozen=True, tag="learn"):
    """What is in the GGUF at `path`; `name` helps to know what a model speaks whose template doesn't say."""

    path: str
    name: str = ""


class Render(msgspec.Struct, frozen=True, tag="render"):
    jinja: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    values: dict[str, Any]


class Learnt(msgspec.Struct, frozen=True):
    """`jinja` is the template to render with: the model's own, or our variant of it where it loses tools.

    `loses`: what its own drops on the way to the prompt, by the names of `templates.abilities`.
    """

    words: Words
    jinja: str
    tools: bool
    loses: frozenset[str] = frozenset()


class Reply(msgspec.Struct, frozen=True):
    """One of them; `refused`: why there is none."""

    learnt: Learnt | None = None
    prompt: str = ""
    refused: str = ""


def learn(asked: Learn) -> Reply:
    from abliterated.templates.abilities import abilities
    from abliterated.templates.variants import tool_variant

    words = read_words(Path(asked.path))
    variant = tool_variant(words.jinja, name=asked.name) if words.jinja else None
    jinja = variant.jinja if variant else words.jinja
    able = abilities(jinja) if jinja else frozenset()
    loses = able - abilities(words.jinja) if variant else frozenset[str]()
    return Reply(learnt=Learnt(words, jinja, {"tools", "calls", "results"} <= able, loses))


def render(asked: Render) -> Reply:
    """In the first shape of the conversation that the template takes: they differ about calls and their names."""
    from abliterated.templates.rendering import TemplateRefuses
    from abliterated.templates.rendering import render as rendered

    refused = ""
    for messages in shapes(asked.messages):
        try:
            prompt = rendered(asked.jinja, messages, tools=asked.tools or None, **asked.values)
        except TemplateRefuses as error:
            refused = refused or str(error)
            continue
        if len(prompt) > LONGEST_PROMPT:
            return Reply(refused="the chat template makes far too much of this conversation")
        return Reply(prompt=prompt)
    return Reply(refused=refused)


def shapes(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """As it is; with ids of nine letters and digits, which some insist on; each with arguments as text, too."""
    yield messages
    if any(message.get("tool_calls") or message.get("tool_call_id") for message in messages):
        short = [_with_short_ids(message) for message in messages]
        yield short
        yield [_with_text(message) for message in messages]
        yield [_with_text(message) for message in short]


def _with_short_ids(message: dict[str, Any]) -> dict[str, Any]:
    changed = dict(message)
    if message.get("tool_calls"):
        changed["tool_calls"] = [{**call, "id": short_id(str(call.get("id", "")))} for call in message["tool_calls"]]
    if message.get("tool_call_id"):
        changed["tool_call_id"] = short_id(str(message["tool_call_id"]))
    return changed


def short_id(identity: str) -> str:
    if len(identity) == 9 and identity.isalnum():
        return identity
    return hashlib.sha256(identity.encode()).hexdigest()[:9]


def _with_text(message: dict[str, Any]) -> dict[str, Any]:
    calls = []
    for call in message.get("tool_calls") or []:
        function = {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls} if calls else message


def serve(questions: BinaryIO, answers: BinaryIO) -> None:
    decode = msgspec.json.Decoder(Learn | Render).decode
    for line in questions:
        try:
            asked = decode(line)
            reply = learn(asked) if isinstance(asked, Learn) else render(asked)
        except (AbliteratedError, msgspec.MsgspecError) as error:
            reply = Reply(refused=str(error))
        except MemoryError:
            reply = Reply(refused="the chat template needs too much memory")
        answers.write(msgspec.json.encode(reply) + b"\n")
        answers.flush()


def main() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with contextlib.suppress(OSError):
        os.nice(5)
    serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
