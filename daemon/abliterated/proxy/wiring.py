"""What joins a link to its server above and to its upstream below.

Does not know: bytes; it only passes on what happens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Protocol, cast

import msgspec

from abliterated.proxy import policy

if TYPE_CHECKING:
    from abliterated.proxy.relay import Link


class Timing(msgspec.Struct, frozen=True):
    """The only clocks there are: for a head that never ends, and for a client that still talks after our last word."""

    head_seconds: float = 60.0
    linger_seconds: float = 2.0


class House(Protocol):
    """What a link needs of its server."""

    loop: asyncio.AbstractEventLoop
    view: policy.View
    timing: Timing
    draining: bool
    links: set[Link]
    upstream_name: str

    def dial(self, factory: Callable[[], asyncio.BaseProtocol]) -> Coroutine[Any, Any, object]: ...

    def retire(self, link: Link) -> None: ...

    def upstream_failed(self, error: OSError) -> None: ...


class Upstream(asyncio.Protocol):
    """The other end of a link; it only passes on what happens."""

    __slots__ = ("_link", "data_received")

    def __init__(self, link: Link) -> None:
        self._link = link
        self.data_received = link.upstream_data  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._link.upstream_made(cast(asyncio.Transport, transport))

    def eof_received(self) -> bool:
        return self._link.upstream_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        self._link.upstream_lost(exc)

    def pause_writing(self) -> None:
        self._link.upstream_full(True)

    def resume_writing(self) -> None:
        self._link.upstream_full(False)
