"""What the proxy costs: the same small upstream asked directly, through the proxy, and through nginx where installed.

`measure(quick)` returns the figures; run as a script it prints them as a table. Everything in one run on one machine,
so only the ratios travel.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from abliterated.proxy.server import new_event_loop, run

GET = b"GET /api/version HTTP/1.1\r\nHost: localhost:11434\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n"
CHAT = b'{"model":"m","messages":[{"role":"user","content":"hello"}]}'
POST = b"POST /api/chat HTTP/1.1\r\nHost: localhost:11434\r\nContent-Length: %d\r\n\r\n" % len(CHAT) + CHAT
VERSION = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n{"version":"0.34.1"}'
LINE = (
    b'{"model":"m","created_at":"2026-01-01T00:00:00Z","message":{"role":"assistant","content":" word"},"done":false}\n'
)
TOKEN = b"%x\r\n%s\r\n" % (len(LINE), LINE)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"

NGINX = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream ollama {{ server 127.0.0.1:{upstream}; keepalive 128; }}
  server {{
    listen 127.0.0.1:{port}; client_max_body_size 0; keepalive_requests 10000000;
    location / {{
      proxy_pass http://ollama; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_request_buffering off;
    }}
  }}
}}
"""


class Ollama(asyncio.Protocol):
    """As much of an upstream as the measurement needs: whole requests in one read, fixed answers."""

    rate = 50.0
    tokens = 100

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"GET"):
            self.transport.write(VERSION * data.count(b"\r\n\r\n"))
        else:
            self.transport.write(STREAM_HEAD)
            self.left = self.tokens
            asyncio.get_running_loop().call_later(1 / self.rate, self.token)

    def token(self) -> None:
        self.left -= 1
        if self.left < 0:
            self.transport.write(END)
            return
        self.transport.write(TOKEN)
        asyncio.get_running_loop().call_later(1 / self.rate, self.token)


def serve_upstream(port: int, tokens: int) -> None:
    async def main() -> None:
        Ollama.tokens = tokens
        server = await asyncio.get_running_loop().create_server(Ollama, "127.0.0.1", port, backlog=4096)
        await server.serve_forever()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


@contextlib.contextmanager
def process(target: Callable[..., object], *arguments: object, port: int) -> Iterator[int]:
    child = multiprocessing.get_context("spawn").Process(target=target, args=arguments, daemon=True)
    child.start()
    try:
        wait_for(port)
        assert child.pid is not None
        yield child.pid
    finally:
        child.terminate()
        child.join(5)


def serve_proxy(port: int, upstream: int) -> None:
    sys.exit(run(f"127.0.0.1:{port}", f"http://127.0.0.1:{upstream}"))


@contextlib.contextmanager
def nginx(program: str, port: int, upstream: int) -> Iterator[int]:
    with tempfile.TemporaryDirectory() as folder:
        configuration = Path(folder, "nginx.conf")
        configuration.write_text(NGINX.format(folder=folder, port=port, upstream=upstream))
        child = subprocess.Popen([program, "-c", str(configuration), "-p", folder], stderr=subprocess.DEVNULL)
        try:
            wait_for(port)
            yield psutil.Process(child.pid).children()[0].pid
        finally:
            child.terminate()
            child.wait(5)


def latency(port: int, seconds: float) -> float:
    """p50 of a GET on one kept connection, in µs."""
    taken = []
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        until = time.perf_counter() + seconds
        while (begin := time.perf_counter()) < until:
            connection.sendall(GET)
            connection.recv(4096)
            taken.append(time.perf_counter() - begin)
    return statistics.median(taken) * 1e6


def cpu(pid: int | None) -> float:
    """Seconds of CPU a process has used."""
    return float(sum(psutil.Process(pid).cpu_times()[:2])) if pid else 0.0


class Hammer(asyncio.Protocol):
    """Sends the next request as soon as the answer is whole."""

    def __init__(self) -> None:
        self.answers = 0
        self.heard = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.transport.write(GET)

    def data_received(self, data: bytes) -> None:
        self.heard += len(data)
        if self.heard >= len(VERSION):
            self.heard = 0
            self.answers += 1
            self.transport.write(GET)


async def throughput(port: int, pid: int | None, seconds: float, connections: int = 64) -> tuple[float, float]:
    """Requests a second over many kept connections, and the CPU of the process between in µs for each."""
    loop = asyncio.get_running_loop()
    made = [(await loop.create_connection(Hammer, "127.0.0.1", port)) for _ in range(connections)]
    await asyncio.sleep(0.2)
    before, begin, used = sum(hammer.answers for _, hammer in made), time.perf_counter(), cpu(pid)
    await asyncio.sleep(seconds)
    answered, taken = sum(hammer.answers for _, hammer in made) - before, time.perf_counter() - begin
    used = cpu(pid) - used
    for transport, _ in made:
        transport.abort()
    return answered / taken, used / answered * 1e6


class Listener(asyncio.Protocol):
    def __init__(self) -> None:
        self.size = 0
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.transport.write(POST)

    def data_received(self, data: bytes) -> None:
        self.size += len(data)
        if data.endswith(END):
            self.ended.set_result(None)


async def streams(port: int, pid: int | None, tokens: int, connections: int = 64) -> tuple[float, float]:
    """CPU of the process between in µs per token, and its memory per stream in kB (above idle)."""
    loop = asyncio.get_running_loop()
    middle = psutil.Process(pid) if pid else None
    idle = middle.memory_info().rss if middle else 0
    before = cpu(pid)
    made = [(await loop.create_connection(Listener, "127.0.0.1", port)) for _ in range(connections)]
    await asyncio.sleep(0.5)
    memory = (middle.memory_info().rss - idle) if middle else 0
    await asyncio.gather(*(listener.ended for _, listener in made))
    used = cpu(pid) - before
    whole = len(STREAM_HEAD) + tokens * len(TOKEN) + len(END)
    assert middle is None or "nginx" in middle.name() or all(listener.size == whole for _, listener in made)
    for transport, _ in made:
        transport.abort()
    return used / (tokens * connections) * 1e6, memory / connections / 1000


def measure(quick: bool) -> dict[str, dict[str, float]]:
    """Figures by path (`direct`, `proxy`, `nginx` where installed); about 8 s, or 15 s when not quick."""
    seconds, tokens, rounds = (0.4, 80, 2) if quick else (0.8, 120, 2)
    upstream, ours, theirs = free_port(), free_port(), free_port()
    program = shutil.which("nginx") or ""
    found: dict[str, dict[str, float]] = {}
    with (
        process(serve_upstream, upstream, tokens, port=upstream),
        process(serve_proxy, ours, upstream, port=ours) as pid,
    ):
        paths: dict[str, tuple[int, int | None]] = {"direct": (upstream, None), "proxy": (ours, pid)}
        with nginx(program, theirs, upstream) if program else contextlib.nullcontext(0) as other:
            if other:
                paths["nginx"] = (theirs, other)
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                for name, (port, middle) in paths.items():
                    per_token, memory = runner.run(streams(port, middle, tokens))
                    found[name] = {"cpu_us_per_token": per_token, "memory_kb_per_stream": memory}
                samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in paths}
                for _ in range(rounds):  # interleaved, so that a noisy moment hits all
                    for name, (port, middle) in paths.items():
                        samples[name].append((latency(port, seconds), *runner.run(throughput(port, middle, seconds))))
                for name, rows in samples.items():
                    for column, key in enumerate(("get_p50_us", "requests_per_second_64", "cpu_us_per_request")):
                        found[name][key] = statistics.median(row[column] for row in rows)
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    names = list(found)
    lines = [f"{'':28}" + "".join(f"{name:>12}" for name in names)]
    for key in found["proxy"]:
        lines.append(f"{key:28}" + "".join(f"{found[name][key]:12.1f}" for name in names))
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(measure("--quick" in sys.argv)))
