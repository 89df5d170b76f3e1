"""Engines for the tests: real processes on real sockets, started and ended here."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import httpx
import ollama
import openai
import psutil

from strangers import gone

T = TypeVar("T")


def until(question: Callable[[], T], seconds: float = 60.0) -> T:
    """The first true answer; fails when none comes in time."""
    deadline = time.monotonic() + seconds
    while not (found := question()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {question}"
        time.sleep(0.01)
    return found


@dataclass
class Engine:
    url: str
    models: Path
    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)

    @cached_property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60)

    @cached_property
    def ollama(self) -> ollama.Client:
        return ollama.Client(host=self.url)

    @cached_property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def close(self) -> None:
        for name, client in vars(self).items():
            if name in ("http", "ollama", "openai"):
                client.close()

    def runners(self) -> list[psutil.Process]:
        """The processes that hold models."""
        return [child for child in psutil.Process(self.process.pid).children() if not gone(child.pid)]

    def holding(self, name: str) -> psutil.Process:
        """The runner that holds that model."""
        text = self.ollama.show(name).modelfile or ""
        [path] = [line[5:] for line in text.splitlines() if line.startswith("FROM ")]
        return until(lambda: next((r for r in self.runners() if path in " ".join(r.cmdline())), None))

    def stalled_request(self, name: str, **body: Any) -> socket.socket:
        """A connection on which a chat was asked for, its answer still to be read."""
        host, port = self.url.removeprefix("http://").split(":")
        data = json.dumps({"model": name, "messages": [{"role": "user", "content": "hi"}], **body}).encode()
        connection = socket.create_connection((host, int(port)), timeout=60)
        connection.sendall(
            b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data) + data
        )
        return connection

    def stalled_talk(self, name: str, **body: Any) -> socket.socket:
        """One on which the answer has begun to stream, and which nobody reads further."""
        connection = self.stalled_request(name, **body)
        assert b" 200 OK" in connection.recv(200)
        return connection

    def create(self, name: str, gguf: Path, **more: object) -> None:
        digest = f"sha256:{hashlib.sha256(gguf.read_bytes()).hexdigest()}"
        self.ollama.create_blob(str(gguf))
        *_, last = self.ollama.create(model=name, files={"model.gguf": digest}, stream=True, **more)  # type: ignore[call-overload]
        assert last.status == "success", last


def whole_answer(connection: socket.socket) -> bytes:
    """Head and body, in however many pieces they come."""
    heard = b""
    while piece := connection.recv(1 << 16):
        heard += piece
        head, ended, body = heard.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        if ended and length and len(body) >= int(length[1]):
            break
    return heard


@contextmanager
def engine(models: Path, *more: str, port: int = 0) -> Iterator[Engine]:
    process = subprocess.Popen(
        [sys.executable, "-m", "abliterated.engine", "--listen", f"127.0.0.1:{port}", "--models", str(models), *more],
        stderr=subprocess.PIPE,
        text=True,
    )
    log: list[str] = []
    running: Engine | None = None
    try:
        running = Engine(listening(process, log), models, process, log)
        yield running
    finally:
        if running:
            running.close()
        process.terminate()
        process.wait(60)
        assert process.stderr is not None
        for thread in threading.enumerate():
            if thread.name == f"log-{process.pid}":
                thread.join(60)
        process.stderr.close()


def listening(process: subprocess.Popen[str], log: list[str]) -> str:
    """The URL the engine says it listens on; its log is read on in the background."""
    assert process.stderr is not None
    for line in process.stderr:
        log.append(line)
        if match := re.search(r"listening on (http://\S+)", line):
            threading.Thread(target=log.extend, args=(process.stderr,), name=f"log-{process.pid}", daemon=True).start()
            return match[1]
    raise AssertionError(f"the engine ended: {''.join(log)}")


def digest(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def blobs(models: Path) -> set[str]:
    return {path.name for path in (models / "blobs").iterdir()}
