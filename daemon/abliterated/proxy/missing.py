"""The 404 for an abliterated model that is not there: Ollama's own, with one sentence more.

The answer is withheld only while it comes, and only a short one with a length; whatever looks otherwise goes on as it
came. Does not know: how a model is made (the callable it is given says).
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from abliterated.proxy.responses import body_length
from abliterated.proxy.routing import Place

LIMIT: Final = 8192
_STATUS = re.compile(rb"HTTP/1\.[01] 404 ")
_LENGTH = re.compile(rb"(?<=\r\n)(content-length:[ \t]*)[0-9]+", re.IGNORECASE)


class Missed(msgspec.Struct, frozen=True):
    """A request for an abliterated model the upstream does not have."""

    model: str
    base: str
    command: str
    loopback: bool  # the client is on this machine


Remark = Callable[[Missed], Awaitable[str]]
"""What to say behind Ollama's own message; empty for nothing."""


def command_for(place: Place) -> str:
    """The one command that would make it; empty where its base can't be told."""
    if not place.base:
        return ""
    command = f"abliterate submit {shlex.quote(place.base)}"
    return command if place.said_by_default else f"{command} --name {shlex.quote(place.name)}"


async def remark_command(missed: Missed) -> str:
    return f"make it with: {missed.command}" if missed.command else ""


def begins(data: bytes) -> bool:
    return _STATUS.match(data + b"HTTP/1.1 404 "[len(data) :]) is not None  # a piece may be shorter than that


def whole(data: bytes) -> bool | None:
    """Is this the whole answer? None: it is none we may touch."""
    end = data.find(b"\r\n\r\n") + 4
    if end < 4:
        return None if len(data) > LIMIT else False
    length = body_length(data[: end - 4])
    if length < 0 or end + length > LIMIT or len(data) > end + length:
        return None
    return len(data) == end + length


def amended(answer: bytes, remark: str) -> bytes:
    """The answer with the remark behind its message, or as it was where there is no such message."""
    head, _, body = answer.partition(b"\r\n\r\n")
    try:
        said: Any = json.loads(body)
    except ValueError:
        return answer
    error = said.get("error") if isinstance(said, dict) else None
    holder, key = (error, "message") if isinstance(error, dict) else (said, "error")
    message = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(message, str) or "not found" not in message:
        return answer
    holder[key] = f"{message}; {remark}"
    changed = json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode() + body[len(body.rstrip()) :]
    head = _LENGTH.sub(lambda found: found[1] + b"%d" % len(changed), head + b"\r\n")
    return head + b"\r\n" + changed
