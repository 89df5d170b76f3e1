"""The proxy as a process of its own: signals in, an exit code out.

Does not know: how a successor is started (the callable it is given does).
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

from abliterated.proxy.server import SETTLE_SECONDS, Proxy, new_event_loop

PATIENCE_SECONDS: Final = 5.0  # for idle clients' last requests, while a successor serves already

HandOver = Callable[[Sequence[socket.socket]], Awaitable[bool]]


class Beside(Protocol):
    """What lives as long as the proxy does."""

    def begin(self) -> None: ...

    async def close(self) -> None: ...


def run(
    proxy: Proxy, *, serving: Callable[[], None] = lambda: None, hand_over: HandOver | None = None,
    beside: Beside | None = None,
) -> int:  # fmt: skip
    """The proxy alone, in the foreground, until SIGTERM or SIGINT; a second signal cuts the drain short.

    With `hand_over`, SIGHUP offers the listening sockets to a successor; where one takes them, we drain and leave.
    """
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_serve(proxy, serving, hand_over, beside))


async def _serve(proxy: Proxy, serving: Callable[[], None], hand_over: HandOver | None, beside: Beside | None) -> int:
    loop = asyncio.get_running_loop()
    asked, again = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: again.set() if asked.is_set() else asked.set())
    settle = SETTLE_SECONDS
    successions: set[asyncio.Task[None]] = set()

    async def succeed() -> None:
        nonlocal settle
        assert hand_over is not None
        if await hand_over(proxy.sockets):
            settle = PATIENCE_SECONDS
            proxy.succeeded = True
            asked.set()

    def hang_up() -> None:
        if not successions and not asked.is_set():
            task = loop.create_task(succeed())
            successions.add(task)
            task.add_done_callback(successions.discard)

    if hand_over is not None:
        loop.add_signal_handler(signal.SIGHUP, hang_up)
    await proxy.start()
    if beside is not None:
        beside.begin()
    serving()
    await asked.wait()
    closing = asyncio.ensure_future(proxy.close(settle_seconds=settle))
    impatient = asyncio.ensure_future(again.wait())
    await asyncio.wait((closing, impatient), return_when=asyncio.FIRST_COMPLETED)
    impatient.cancel()
    if not closing.done():
        closing.cancel()
    await asyncio.gather(closing, impatient, return_exceptions=True)
    if beside is not None:
        await beside.close()
    return 0
