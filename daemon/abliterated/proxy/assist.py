"""The seam for help: a whole request for an abliterated model may be handed to an assistant, which answers it.

The relay gathers the request (bounded), asks the assistant, and takes the connection back afterwards. An assistant
that declines has changed nothing: the request goes on as it came.

Does not know: what help is, tools, templates.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec

from abliterated.proxy.framing import Head


class Asked(msgspec.Struct, frozen=True):
    """A request handed over: `content` is its body, unframed and unpacked; `upstream` is where it would have gone."""

    head: Head
    content: bytes
    route: str
    model: str
    upstream: str


class Outlet(Protocol):
    """The way to the client. What is written must be one whole HTTP/1.1 answer, with a length or chunked.

    `write` waits while the client is slow. When the client leaves, the assistant's task is cancelled.
    """

    async def write(self, data: bytes) -> None: ...


Assistant = Callable[[Asked, Outlet], Awaitable[bool]]
"""Answers and returns True; or returns False before it has written a byte: the request is then relayed as it came.

An exception before the first byte becomes a 500 in the asked API's shape, after it a cut connection."""

Wanted = Callable[[str, str], bool]
"""Route and model → whether that request should be gathered and offered. Asked once for each request, in the relay:
it must be quick and must not wait."""
