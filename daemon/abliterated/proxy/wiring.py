"""What joins a link to its server above and to its upstream below.

Does not know: bytes; it only passes on what happens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Protocol, cast

import msgspec

from abliterated.proxy import policy
from abliterated.proxy.access import AccessLog
from abliterated.proxy.assist import Assistant, Wanted
from abliterated.proxy.marks import Mark, Tally

if TYPE_CHECKING:
    from abliterated.proxy.gate import Gate
    from abliterated.proxy.pair import Pair
    from abliterated.proxy.relay import Link


class Timing(msgspec.Struct, frozen=True):
    """The only clocks there are: for a head that never ends, and for a client that still talks after our last word.

    `look_seconds`: so often is asked whether a client that has closed its half has left altogether.
    """

    head_seconds: float = 60.0
    linger_seconds: float = 2.0
    look_seconds: float = 30.0


class House(Protocol):
    """What a link needs of its server."""

    loop: asyncio.AbstractEventLoop
    timing: Timing
    draining: bool
    links: set[Link]
    known: set[bytes]
    waiting: set[Gate]
    held_bytes: int
    assistant: Assistant | None
    wanted: Wanted | None
    tally: Tally
    access: AccessLog | None
    upstream_names: list[str]

    @property
    def view(self) -> policy.View: ...

    def dial(self, factory: Callable[[], asyncio.BaseProtocol], where: int) -> Coroutine[Any, Any, object]: ...

    def arm(self) -> None: ...

    def remember(self, raw: bytes) -> None: ...

    def retire(self, link: Link) -> None: ...

    def upstream_failed(self, error: OSError, where: int) -> str: ...

    async def amend(self, client: asyncio.Transport, answer: bytes, mark: Mark) -> bytes: ...

    def finished(self, client: asyncio.Transport, mark: Mark, size: int) -> None: ...


class Upstream(asyncio.Protocol):
    """The other end of a link; it only passes on what happens."""

    __slots__ = ("_link", "data_received")

    def __init__(self, pair: Pair) -> None:
        link = self._link = cast("Link", pair)
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


class Deaf(asyncio.Protocol):
    """For a connection that is being left: what it still says is nobody's."""
