"""The loads put on a proxy, and what each of them costs it. Does not know which proxy it is."""

from __future__ import annotations

import asyncio
import gc
import socket
import statistics
import struct
import time
from pathlib import Path
from typing import cast

import psutil

from bench.proxy_servers import END, STREAM_HEAD, TOKEN

GET = b"GET /api/version HTTP/1.1\r\nHost: localhost:11434\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n"
CHAT = b'{"model":"qwen3:8b","messages":[{"role":"user","content":"hello"}]}'


def chat(rate: float, tokens: int, name: str = "", fault: str = "", body: bytes = CHAT) -> bytes:
    extra = f"X-Pace: {rate} {tokens}\r\n" + (f"X-Name: {name}\r\n" if name else "")
    extra += f"X-Fault: {fault}\r\n" if fault else ""
    head = f"POST /api/chat HTTP/1.1\r\nHost: localhost:11434\r\n{extra}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class FirstThread(int):
    """The pid of a process whose other threads do other work: its CPU is the first one's alone."""


def cpu(pid: int | None) -> float:
    """Seconds of CPU a process has used; to the nanosecond where the system tells."""
    if pid is None:
        return 0.0
    try:
        threads = str(pid) if isinstance(pid, FirstThread) else "*"
        tasks = Path(f"/proc/{pid}/task").glob(f"{threads}/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9
    except (OSError, IndexError, ValueError):
        return float(sum(psutil.Process(pid).cpu_times()[:2]))


def latency(port: int, seconds: float) -> float:
    """p50 of a GET on one kept connection, in µs."""
    taken = []
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        until = time.perf_counter() + seconds
        gc.disable()
        while (begin := time.perf_counter()) < until:
            connection.sendall(GET)
            connection.recv(4096)
            taken.append(time.perf_counter() - begin)
        gc.enable()
    return statistics.median(taken) * 1e6


class Hammer(asyncio.Protocol):
    """Sends the next request as soon as the answer is whole; an answer's length is learnt from the first."""

    def __init__(self) -> None:
        self.answers = 0
        self.heard = 0
        self.whole = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(GET)

    def data_received(self, data: bytes) -> None:
        self.heard += len(data)
        if not self.whole:
            self.whole = len(data)  # the first answer of a small upstream comes in one piece
        if self.heard >= self.whole:
            self.heard = 0
            self.answers += 1
            self.transport.write(GET)


async def throughput(port: int, pid: int | None, seconds: float, connections: int = 64) -> tuple[float, float]:
    """Requests a second over many kept connections, and the CPU of the process between in µs for each."""
    loop = asyncio.get_running_loop()
    made = [(await loop.create_connection(Hammer, "127.0.0.1", port)) for _ in range(connections)]
    await asyncio.sleep(0.15)
    before, begin, used = sum(hammer.answers for _, hammer in made), time.perf_counter(), cpu(pid)
    await asyncio.sleep(seconds)
    answered, taken = sum(hammer.answers for _, hammer in made) - before, time.perf_counter() - begin
    used = cpu(pid) - used
    for transport, _ in made:
        transport.abort()
    return answered / taken, used / max(answered, 1) * 1e6


class Listener(asyncio.Protocol):
    def __init__(self, request: bytes) -> None:
        self.request = request
        self.size = 0
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.size += len(data)
        if data.endswith(END) and not self.ended.done():
            self.ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.cancel()


async def streams(port: int, pid: int | None, connections: int, rate: float, tokens: int) -> float:
    """CPU of the process between, in µs for each token, from when all streams run to when they end."""
    loop = asyncio.get_running_loop()
    request = chat(rate, tokens)
    made = [(await loop.create_connection(lambda: Listener(request), "127.0.0.1", port)) for _ in range(connections)]
    await asyncio.sleep(0.3)
    begun, before = sum(listener.size for _, listener in made), cpu(pid)
    await asyncio.sleep(tokens / rate - 0.6)
    heard, used = sum(listener.size for _, listener in made) - begun, cpu(pid) - before
    await asyncio.gather(*(listener.ended for _, listener in made))
    for transport, _ in made:
        transport.abort()
    return used / (heard / len(TOKEN)) * 1e6


async def memory(port: int, pid: int | None, connections: int = 1000) -> float:
    """Memory of the process between for each of many slow streams, above idle, in kB."""
    if pid is None:
        return 0.0
    loop = asyncio.get_running_loop()
    middle = psutil.Process(pid)
    idle = middle.memory_info().rss
    request = chat(5, 1000)
    made = [(await loop.create_connection(lambda: Listener(request), "127.0.0.1", port)) for _ in range(connections)]
    await asyncio.sleep(1.5)
    async with asyncio.timeout(30):  # a busy machine takes its time
        while not all(listener.size > len(STREAM_HEAD) for _, listener in made):
            await asyncio.sleep(0.1)
    used = middle.memory_info().rss - idle
    for transport, listener in made:
        listener.ended.cancel()
        transport.abort()
    await asyncio.sleep(0.3)
    return used / connections / 1000


def upload(port: int, pid: int | None, size: int) -> tuple[float, float]:
    """MB/s of one upload, and how much memory the process between had more at its peak, in MB."""
    piece = bytes(1 << 20)
    middle = psutil.Process(pid) if pid else None
    idle = peak = middle.memory_info().rss if middle else 0
    with socket.create_connection(("127.0.0.1", port)) as connection:
        begin = time.perf_counter()
        connection.sendall(b"POST /api/blobs/sha256:0 HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % size)
        for place in range(0, size, len(piece)):
            connection.sendall(piece[: min(len(piece), size - place)])
            if middle and not place & 0x3FFFFFF:
                peak = max(peak, middle.memory_info().rss)
        answer = connection.recv(4096)
        taken = time.perf_counter() - begin
    assert b" 201 " in answer, answer
    return size / taken / 1e6, (peak - idle) / 1e6


def disconnects(port: int, upstream: int, count: int) -> list[float]:
    """How long after a client left in mid-stream the upstream heard of it, in ms; every other leaves with a reset."""
    asked = []
    for number in range(count):
        name = f"c{time.monotonic_ns()}"
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(chat(200, 10_000, name))
            while TOKEN not in connection.recv(65536):
                pass
            if number % 2:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            left = time.monotonic()
        asked.append((name, left))
    taken = []
    with socket.create_connection(("127.0.0.1", upstream)) as connection:
        for name, left in asked:
            deadline = time.monotonic() + 5
            heard = 0.0
            while not heard and time.monotonic() < deadline:
                connection.sendall(b"GET /lost/%s HTTP/1.1\r\n\r\n" % name.encode())
                heard = float(connection.recv(4096).rpartition(b"\r\n\r\n")[2])
            taken.append((heard - left) * 1000 if heard else float("inf"))
    return taken
