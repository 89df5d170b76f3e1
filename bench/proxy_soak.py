"""A long mixed load with faults on both sides: does memory stay where it was, does every connection end?

Clients ask, stream, upload, leave in mid-stream, read slowly, speak nonsense, name missing models; the upstream resets
streams and falls silent. Everything that may look at a request is on. Does not know what it costs.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
import sys
import time
from collections.abc import Awaitable, Callable
from socket import SO_LINGER, SOL_SOCKET

import psutil

from abliterated.proxy.server import new_event_loop
from bench import proxy_servers as servers
from bench.proxy_loads import GET, chat

CLIENTS = 24
WARM_SHARE = 0.25  # of the time, before memory is measured first
LAST_SECONDS = 6.0  # for connections to end in, once everybody has left
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Soak:
    def __init__(self, port: int) -> None:
        self.port = port
        self.exchanges = self.wrong = 0
        self.what_was_wrong = ""
        self.random = random.Random(1)

    def expect(self, right: bool, what: str) -> None:
        self.exchanges += 1
        if not right:
            self.wrong += 1
            self.what_was_wrong = self.what_was_wrong or what

    async def get(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(20):
            writer.write(GET)
            self.expect(await reader.readexactly(len(servers.VERSION)) == servers.VERSION, "a GET's answer")

    async def stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tokens = self.random.randrange(1, 60)
        whole = servers.STREAM_HEAD + servers.TOKEN * tokens + servers.END
        writer.write(chat(200, tokens))
        self.expect(await reader.readexactly(len(whole)) == whole, "a stream")

    async def leave(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(chat(100, 1000))
        await reader.readuntil(servers.TOKEN)
        if self.random.random() < 0.5:
            writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
        self.expect(True, "")

    async def broken(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(chat(200, 10, fault="reset"))
        data = b""
        with contextlib.suppress(ConnectionError):
            data = await reader.read(-1)
        self.expect(servers.END not in data[-5:], "a broken stream looked whole")

    async def silent(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(chat(1, 1, fault="silent"))
        await asyncio.sleep(0.1)
        self.expect(True, "")

    async def upload(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = 3 << 20
        writer.write(b"POST /api/blobs/sha256:0 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size)
        writer.write(bytes(size))
        await writer.drain()
        self.expect(b" 201 " in await reader.readuntil(b"\r\n\r\n"), "an upload's answer")

    async def half_upload(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n" + b'{"images":["' + bytes(99)
        )
        await asyncio.sleep(0.05)
        self.expect(True, "")

    async def nonsense(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n")
        self.expect((await reader.read(-1)).startswith(b"HTTP/1.1 400 "), "nonsense's answer")

    async def missing(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(chat(1, 1, fault="missing", body=b'{"model":"qwen3-abliterated:8b"}'))
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split()[0]))
        self.expect(b"abliterate submit qwen3:8b" in body, "a missing model's answer")

    async def aliased(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        whole = servers.STREAM_HEAD + servers.TOKEN * 3 + servers.END
        writer.write(chat(200, 3, body=b'{"messages":[],"model":"qwen3:8b-abliterated"}'))
        self.expect(await reader.readexactly(len(whole)) == whole, "an aliased model's stream")

    async def slow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tokens = 20
        whole = len(servers.STREAM_HEAD) + tokens * len(servers.TOKEN) + len(servers.END)
        writer.write(chat(500, tokens))
        heard = 0
        while heard < whole and (data := await reader.read(200)):
            heard += len(data)
            await asyncio.sleep(0.005)
        self.expect(heard == whole, "a slowly read stream")

    async def client(self, until: float) -> None:
        acts: list[Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]] = [
            self.get, self.get, self.stream, self.stream, self.leave, self.broken, self.silent, self.upload,
            self.half_upload, self.nonsense, self.missing, self.aliased, self.slow,
        ]  # fmt: skip
        while time.monotonic() < until:
            act = self.random.choice(acts)
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                with contextlib.closing(writer):
                    await asyncio.wait_for(act(reader, writer), 20)
            except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                self.expect(False, f"{act.__name__}: {error!r}")


async def run(port: int, pid: int, minutes: float) -> dict[str, float]:
    soak = Soak(port)
    begin = time.monotonic()
    until = begin + minutes * 60
    clients = [asyncio.create_task(soak.client(until)) for _ in range(CLIENTS)]
    middle = psutil.Process(pid)
    await asyncio.sleep(minutes * 60 * WARM_SHARE)
    early = await _resident(middle)
    await asyncio.gather(*clients)
    late = await _resident(middle)
    deadline = time.monotonic() + LAST_SECONDS
    while (hung := _connections(middle)) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    if soak.what_was_wrong:
        sys.stderr.write(f"first that was wrong: {soak.what_was_wrong}\n")
    return {
        "minutes": minutes,
        "exchanges": soak.exchanges,
        "wrong": soak.wrong,
        "hung": hung,
        "resident_mb": late / 1e6,
        "drift_mb": (late - early) / 1e6,
    }


async def _resident(process: psutil.Process) -> float:
    """Memory, as the least of a second's looks: what is only in use for a moment is no drift."""
    looks = []
    for _ in range(20):
        looks.append(process.memory_info().rss)
        await asyncio.sleep(0.05)
    return float(min(looks))


def _connections(process: psutil.Process) -> int:
    return sum(1 for connection in process.net_connections("tcp") if connection.status != psutil.CONN_LISTEN)


def measure(minutes: float) -> dict[str, float]:
    """What a soak of so many minutes found."""
    upstream, port = servers.free_port(), servers.free_port()
    with (
        servers.process(servers.serve_upstream, upstream, port=upstream),
        servers.process(servers.serve_armed, port, upstream, port=port) as pid,
        asyncio.Runner(loop_factory=new_event_loop) as runner,
    ):
        return runner.run(run(port, pid, minutes))
