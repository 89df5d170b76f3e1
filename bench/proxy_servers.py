"""Who takes part in the proxy's measurements: a small upstream, our proxy in two states, nginx and haproxy.

Each is a process of its own on a port of its own, one worker each. Does not know what is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from abliterated.proxy.alone import run
from abliterated.proxy.assist import Asked, Outlet
from abliterated.proxy.server import Proxy, Steering, new_event_loop

VERSION = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n{"version":"0.34.1"}'
LINE = (
    b'{"model":"m","created_at":"2026-01-01T00:00:00Z","message":{"role":"assistant","content":" word"},"done":false}\n'
)
TOKEN = b"%x\r\n%s\r\n" % (len(LINE), LINE)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
_MISSING_BODY = b'{"error":"model \'qwen3-abliterated:8b\' not found"}'
MISSING = b"HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
    len(_MISSING_BODY),
    _MISSING_BODY,
)

NGINX = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 8192; }}
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

HAPROXY = """
global
  maxconn 8192
  nbthread 1
defaults
  mode http
  timeout connect 10s
  timeout client 1h
  timeout server 1h
listen ollama
  bind 127.0.0.1:{port}
  server ollama 127.0.0.1:{upstream}
"""


class Ollama(asyncio.Protocol):
    """As much of an upstream as is needed: heads in one read, fixed answers, streams at a pace, uploads swallowed.

    `X-Pace: RATE COUNT` asks for so many tokens a second, and so many; `X-Name` names a connection, and
    `GET /lost/NAME` tells when the upstream heard of its end. `X-Fault: reset` breaks a stream, `silent` says nothing,
    `missing` is a 404.
    """

    lost: dict[str, float] = {}  # noqa: RUF012 (one process, one upstream)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.name = ""
        self.left, self.rate, self.fault = 0, 50.0, b""

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"GET /lost/"):
            name = data[10:].partition(b" ")[0].decode()
            text = f"{self.lost.get(name, 0):.9f}".encode()
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text) + text)
        elif data.startswith(b"GET"):
            self.transport.write(VERSION * data.count(b"\r\n\r\n"))
        elif data.startswith(b"POST /api/blobs"):
            head, _, body = data.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: ([0-9]+)", head)
            assert length is not None
            self.transport.set_protocol(Sink(self.transport, int(length[1]) - len(body), self))
        else:
            pace = re.search(rb"(?i)x-pace: ([0-9.]+) ([0-9]+)", data)
            named = re.search(rb"(?i)x-name: (\w+)", data)
            self.name = named[1].decode() if named else ""
            fault = re.search(rb"(?i)x-fault: (\w+)", data)
            self.fault = fault[1] if fault else b""
            if self.fault == b"missing":
                self.transport.write(MISSING)
            if self.fault in (b"missing", b"silent"):
                return
            if pace:
                self.rate, self.left = float(pace[1]), int(pace[2])
            self.transport.write(STREAM_HEAD)
            asyncio.get_running_loop().call_later(1 / self.rate, self.token)

    def token(self) -> None:
        if self.transport.is_closing():
            return
        self.left -= 1
        if self.fault == b"reset" and self.left < 3:
            self.transport.abort()
        elif self.left < 0:
            self.transport.write(END)
        else:
            self.transport.write(TOKEN)
            asyncio.get_running_loop().call_later(1 / self.rate, self.token)

    def eof_received(self) -> bool:
        self.note_loss()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.note_loss()

    def note_loss(self) -> None:
        if self.name:
            self.lost.setdefault(self.name, time.monotonic())
            self.name = ""


class Sink(asyncio.BufferedProtocol):
    """Swallows an upload without making objects of it, then answers."""

    def __init__(self, transport: Any, left: int, after: Ollama) -> None:
        self.transport, self.left, self.after = transport, left, after
        self.buffer = bytearray(1 << 20)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.left -= nbytes
        if self.left <= 0:
            self.transport.write(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")
            self.transport.set_protocol(self.after)


def serve_upstream(port: int) -> None:
    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(Ollama, "127.0.0.1", port, backlog=4096)
        await server.serve_forever()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main())


def serve_proxy(port: int, upstream: int) -> None:
    sys.exit(run(Proxy(f"127.0.0.1:{port}", f"http://127.0.0.1:{upstream}")))


async def no_help(asked: Asked, outlet: Outlet) -> bool:
    return False


def serve_armed(port: int, upstream: int) -> None:
    """Everything that may look at a request is on: names, aliases, figures, an assistant for abliterated models."""
    steering = Steering(aliases=(("qwen3:8b-abliterated", "qwen3-abliterated:8b"),), observe=True)
    proxy = Proxy(f"127.0.0.1:{port}", f"http://127.0.0.1:{upstream}", steering=steering)
    proxy.assistant = no_help
    proxy.change(assist=True)
    sys.exit(run(proxy))


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
        child.join(2)
        child.kill()
        child.join(5)


@contextlib.contextmanager
def other(name: str, port: int, upstream: int) -> Iterator[int]:
    """nginx or haproxy; the pid of the one that works."""
    program = shutil.which(name, path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin:/opt/homebrew/bin") or name
    with tempfile.TemporaryDirectory() as folder:
        configuration = Path(folder, f"{name}.cfg")
        text = NGINX if name == "nginx" else HAPROXY
        configuration.write_text(text.format(folder=folder, port=port, upstream=upstream))
        command = [program, "-c", str(configuration), "-p", folder] if name == "nginx" else []
        command = command or [program, "-f", str(configuration), "-db", "-q"]
        child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            wait_for(port)
            workers = psutil.Process(child.pid).children()
            yield workers[0].pid if workers else child.pid
        finally:
            child.terminate()
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait(5)


def installed(name: str) -> bool:
    return shutil.which(name, path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin:/opt/homebrew/bin") is not None
