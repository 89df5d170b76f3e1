"""A conversation as two scripts: what the client does and what the upstream does, over real sockets.

The same conversation is played directly and through a proxy; what each side heard, and how it ended, must be equal.
"""

from __future__ import annotations

import asyncio
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from abliterated.proxy.server import Proxy, new_event_loop

DEADLINE = 60.0  # the patience of a loaded machine; nothing is judged by it


@dataclass(frozen=True)
class Send:
    data: bytes
    cut: int = 0  # send in pieces of this many bytes


@dataclass(frozen=True)
class Read:
    count: int


@dataclass(frozen=True)
class ReadAll:
    """To the other side's end of file."""


@dataclass(frozen=True)
class HalfClose:
    pass


@dataclass(frozen=True)
class Reset:
    pass


Step = Send | Read | ReadAll | HalfClose | Reset


@dataclass
class Heard:
    data: bytes = b""
    ending: str = ""


def play(connection: socket.socket, steps: Sequence[Step]) -> Heard:
    """Carry out one side's script; what is left unread at its end is read to the end of file."""
    heard = Heard()
    connection.settimeout(DEADLINE)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection:
        try:
            for step in steps:
                match step:
                    case Send(data, cut):
                        for start in range(0, len(data), cut or len(data) or 1):
                            connection.sendall(data[start : start + (cut or len(data))])
                    case Read(count):
                        _read(connection, heard, len(heard.data) + count)
                    case ReadAll():
                        _read(connection, heard, None)
                    case HalfClose():
                        connection.shutdown(socket.SHUT_WR)
                    case Reset():
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        heard.ending = "reset by me"
                        return heard
        except TimeoutError:
            heard.ending = "timed out"
        except ConnectionError:
            heard.ending = "reset"
    return heard


def _read(connection: socket.socket, heard: Heard, upto: int | None) -> None:
    pieces: list[bytes] = []
    total = len(heard.data)
    try:
        while upto is None or total < upto:
            piece = connection.recv(1 << 20 if upto is None else min(1 << 20, upto - total))
            if not piece:
                heard.ending = "end of file"
                return
            pieces.append(piece)
            total += len(piece)
    finally:
        heard.data += b"".join(pieces)


@dataclass
class ScriptedUpstream:
    """Listens, and plays the next script for each connection."""

    family: int = socket.AF_INET
    path: str = ""
    scripts: queue.Queue[Sequence[Step] | Callable[[socket.socket], Heard]] = field(default_factory=queue.Queue)
    heard: queue.Queue[Heard] = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        self.listener = socket.socket(self.family, socket.SOCK_STREAM)
        try:
            if self.family == socket.AF_UNIX:
                self.listener.bind(self.path)
            else:
                self.listener.bind(("127.0.0.1" if self.family == socket.AF_INET else "::1", 0))
        except OSError:
            self.listener.close()
            raise
        self.listener.listen(64)
        self.servers: list[threading.Thread] = []
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        if self.family == socket.AF_UNIX:
            return f"unix:{self.path}"
        host, port = self.listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            server = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self.servers.append(server)
            server.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            script = self.scripts.get_nowait()
        except queue.Empty:
            connection.close()
            self.heard.put(Heard(ending="unexpected connection"))
            return
        self.heard.put(script(connection) if callable(script) else play(connection, script))

    def close(self) -> None:
        if self.listener.fileno() < 0:
            return
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in (self.thread, *self.servers):
            thread.join(DEADLINE)


@contextmanager
def upstream(family: int = socket.AF_INET, path: str = "") -> Iterator[ScriptedUpstream]:
    server = ScriptedUpstream(family, path)
    try:
        yield server
    finally:
        server.close()


class Running:
    """A proxy in a thread of its own, with its own loop."""

    def __init__(self, listen: str, url: str, factory: Callable[[], Any], arguments: dict[str, Any]) -> None:
        self.started = threading.Event()
        self.error: BaseException | None = None
        self.proxy = Proxy(listen, url, **arguments)
        self.drain = 0.0
        self.thread = threading.Thread(target=self._run, args=(factory,), daemon=True)
        self.thread.start()
        assert self.started.wait(DEADLINE)
        if self.error:
            raise self.error

    def _run(self, factory: Callable[[], Any]) -> None:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.stop = asyncio.Event()
        self.faults: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.faults.append(context))
        try:
            await self.proxy.start()
        except BaseException as error:
            self.error = error
            self.started.set()
            return
        self.started.set()
        await self.stop.wait()
        await self.proxy.close(self.drain)

    @property
    def address(self) -> str:
        return self.proxy.addresses[0]

    def connect(self) -> socket.socket:
        return connect(self.address)

    def close(self, drain: float = 0.0) -> None:
        self.drain = drain
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(DEADLINE + drain)
        assert not self.thread.is_alive()
        assert self.faults == [], self.faults


def connect(address: str) -> socket.socket:
    address = address.removeprefix("http://")
    if address.startswith("unix:"):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address.removeprefix("unix:"))
        return connection
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), DEADLINE)


@contextmanager
def proxy(
    url: str, listen: str = "127.0.0.1:0", factory: Callable[[], Any] = new_event_loop, **arguments: Any
) -> Iterator[Running]:
    running = Running(listen, url, factory, arguments)
    try:
        yield running
    finally:
        if running.thread.is_alive():
            running.close()


def until(holds: Callable[[], bool]) -> None:
    """What the proxy notes for itself may come a moment after what its client has heard."""
    deadline = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def converse(
    server: ScriptedUpstream, address: str, client: Sequence[Step], upstream_steps: Sequence[Step]
) -> tuple[Heard, Heard]:
    """Play one conversation; what the client heard, and what the upstream heard."""
    server.scripts.put(upstream_steps)
    mine = play(connect(address), client)
    return mine, server.heard.get(timeout=DEADLINE)
