"""A restart that loses nothing: listening sockets go to the successor, and nobody who knocks meanwhile is turned away.

Two ways. `hand_over`: a second process takes the sockets and serves at once, the first lets what is under way end. For
the proxy alone. `replace_process`: the same process becomes the new program when all is drained; who knocks meanwhile
waits in the sockets' backlog. For the daemon, whose home has one owner. SO_REUSEPORT would be a third: two listeners
on one port; but what lies in a closing listener's backlog is reset there.

Does not know: what is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Final, NoReturn

from abliterated.service import FIRST_SOCKET

log = logging.getLogger(__name__)

SOCKETS: Final = "ABLITERATED_SOCKETS"  # descriptors of listeners, then the one to say "ready" on
READY_SECONDS: Final = 30.0
_OUT_OF_THE_WAY: Final = 64


def command() -> list[str]:
    """This program, as it was started."""
    return [sys.executable, *sys.orig_argv[1:]]


def in_a_terminal() -> bool:
    """A hangup then means that the terminal is closed, and we are to go with it. Ask at the start."""
    return os.isatty(0)


class Inheritance:
    """What a predecessor left us."""

    def __init__(self, environ: MutableMapping[str, str] | None = None) -> None:
        env = os.environ if environ is None else environ
        numbers = [int(text) for text in env.pop(SOCKETS, "").split(",") if text]
        for number in numbers:
            os.set_inheritable(number, False)
        self._ready = numbers.pop() if numbers else -1
        self.sockets = [socket.socket(fileno=number) for number in numbers]

    def serving(self) -> None:
        """We accept now: the predecessor may stop."""
        if self._ready >= 0:
            with contextlib.suppress(OSError):
                os.write(self._ready, b"1")
            os.close(self._ready)
            self._ready = -1


async def hand_over(sockets: Sequence[socket.socket]) -> bool:
    """Start this program again with our sockets; True when it serves. Where it doesn't, it is gone, and we go on."""
    hear, say = os.pipe()
    numbers = [listener.fileno() for listener in sockets]
    try:
        environ = {**os.environ, SOCKETS: ",".join(map(str, (*numbers, say)))}
        child = await asyncio.create_subprocess_exec(*command(), env=environ, pass_fds=(*numbers, say))
    except OSError as error:
        os.close(hear)
        os.close(say)
        log.error("no successor could be started: %s", error, extra={"action": "succession_failed"})
        return False
    os.close(say)
    try:
        told = await asyncio.wait_for(_hear(hear), READY_SECONDS)
    except TimeoutError:
        told = b""
    finally:
        os.close(hear)
    if told:
        log.info("pid %d serves now", child.pid, extra={"action": "succeeded"})
        return True
    with contextlib.suppress(ProcessLookupError):
        child.kill()
    await child.wait()
    log.error("the successor did not come up: we go on", extra={"action": "succession_failed"})
    return False


async def _hear(descriptor: int) -> bytes:
    loop = asyncio.get_running_loop()
    told: asyncio.Future[bytes] = loop.create_future()

    def ready() -> None:
        loop.remove_reader(descriptor)
        if not told.done():
            told.set_result(os.read(descriptor, 1))

    loop.add_reader(descriptor, ready)
    try:
        return await told
    finally:
        loop.remove_reader(descriptor)


def keep(sockets: Sequence[socket.socket]) -> list[int]:
    """Second descriptors of listeners, which outlive their closing and will be in nobody's way."""
    return [fcntl.fcntl(listener.fileno(), fcntl.F_DUPFD_CLOEXEC, _OUT_OF_THE_WAY) for listener in sockets]


def replace_process(kept: Mapping[str, Sequence[int]], environ: Mapping[str, str]) -> NoReturn:
    """Become this program anew, with these listeners, as a service manager would hand them over."""
    env = {key: value for key, value in environ.items() if not key.startswith("LISTEN_")}
    named = [(name, number) for name, numbers in kept.items() for number in numbers]
    for place, (_, number) in enumerate(named, FIRST_SOCKET):
        os.dup2(number, place, inheritable=True)
    if named:
        env |= {
            "LISTEN_FDS": str(len(named)),
            "LISTEN_PID": str(os.getpid()),
            "LISTEN_FDNAMES": ":".join(name for name, _ in named),
        }
    os.execve(sys.executable, command(), env)  # noqa: S606 (our own program, as it was started)
