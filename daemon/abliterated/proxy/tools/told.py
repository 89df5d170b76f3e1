"""Tools told in words: for a model whose own template can't be rendered here, or says nothing of tools.

They go into the system message (or before the first question, where a template has no such message), calls and results
into the words of the conversation, all between plain tags. What was trained otherwise may follow it less well. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from abliterated.shapes.talk import Message

_HEAD: Final = "You can call tools. Each is described here as JSON:\n<tools>\n"
_HOW: Final = (
    "\n</tools>\nTo call one, answer with its name and arguments as JSON between tags, and nothing else:\n"
    '<tool_call>\n{"name": NAME, "arguments": OBJECT}\n</tool_call>\n'
    "The result comes between <tool_response> tags. Call one only where it helps; else answer in words."
)


def tell(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, system: str = "", choice: str = "auto",
    several: bool = True, roles: bool = True,
) -> list[Message]:  # fmt: skip
    """The conversation with tools in words. `system`: the model's own, where the request has none.

    `roles`: its template takes system messages.
    """
    told = _HEAD + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools) + _HOW
    if choice == "required":
        told += " You must call one now."
    elif choice.startswith(":"):
        told += f" You must call {choice[1:]} now."
    if not several:
        told += " Call only one at a time."
    talk = _in_words(messages)
    if talk and talk[0].role == "system":
        first, *talk = talk
        told = f"{first.content}\n\n{told}"
    elif system:
        told = f"{system}\n\n{told}"
    if roles:
        return [Message("system", told), *talk]
    place = next((place for place, message in enumerate(talk) if message.role == "user"), None)
    if place is None:
        return [Message("user", told), *talk]
    talk[place] = msgspec.structs.replace(talk[place], content=f"{told}\n\n{talk[place].content or ''}")
    return talk


def _in_words(messages: Sequence[Message]) -> list[Message]:
    talk: list[Message] = []
    for message in messages:
        if message.role == "tool":
            said = f"<tool_response>\n{message.content or ''}\n</tool_response>"
            if talk and talk[-1].role == "user" and (talk[-1].content or "").startswith("<tool_response>"):
                talk[-1] = msgspec.structs.replace(talk[-1], content=f"{talk[-1].content}\n{said}")
            else:
                talk.append(Message("user", said, images=message.images))
        elif message.tool_calls:
            calls = "\n".join(
                "<tool_call>\n"
                + json.dumps(
                    {"name": call.function.name, "arguments": call.function.arguments or {}}, ensure_ascii=False
                )
                + "\n</tool_call>"
                for call in message.tool_calls
            )
            content = f"{message.content}\n{calls}" if message.content else calls
            talk.append(msgspec.structs.replace(message, content=content, tool_calls=None))
        else:
            talk.append(message)
    return talk
