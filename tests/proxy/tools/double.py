"""An engine that says what a test tells it to, and remembers what it was asked; a proxy that helps before it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from abliterated.proxy.server import Steering
from abliterated.proxy.tools.assistant import Assist, Help, More
from abliterated.proxy.tools.renderer import Renderer
from proxy.script import Running, proxy

MODEL = "lamp-abliterated:1b"
TEMPLATE = (
    "{%- if tools %}<|im_start|>system\n<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>"
    "<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def write_gguf(path: Path, jinja: str = TEMPLATE, **more: str) -> Path:
    """Key-values alone: what help reads of a model."""
    pairs = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.chat_template": jinja, **more}
    body = b"".join(_text(key) + struct.pack("<I", 8) + _text(value) for key, value in pairs.items())
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + body)
    return path


@dataclass
class Double:
    """`says`: the raw completion, piece by piece; a dict is a line of its own. With another `status` the error."""

    gguf: str
    capabilities: list[str] = field(default_factory=lambda: ["completion"])
    says: list[str | dict[str, Any]] = field(default_factory=lambda: ["Hello", " there"])
    status: int = 200
    version: str = "0.11.0"
    system: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    endless: bool = False
    breaks: bool = False  # after what it says, instead of an end
    shuts: bool = False  # as its guard does to a page from elsewhere: whatever is asked
    port: int = 0

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for at, body, _ in self.asked if at == path]


def _handler(double: Double) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            known = {"models": [{"name": MODEL}]} if self.path == "/api/tags" else {"version": double.version}
            self._whole(200, known)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            double.asked.append((self.path, body, dict(self.headers.items())))
            if double.shuts:
                self._whole(403, {})
            elif self.path == "/api/show":
                self._whole(200, {"modelfile": f"FROM {double.gguf}\n", "capabilities": double.capabilities,
                                  "template": "", "system": double.system})  # fmt: skip
            elif double.status != 200:
                self._whole(double.status, {"error": double.says[0]})
            elif not body.get("stream", True):
                self._whole(200, {"told": "as it is"})
            else:
                self._stream()

        def _whole(self, status: int, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            for name, text in {**double.headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(data)

        def _stream(self) -> None:
            self.send_response(200)
            for name, text in {**double.headers, "Transfer-Encoding": "chunked"}.items():
                self.send_header(name, text)
            self.end_headers()
            key = "message" if self.path == "/api/chat" else "response"
            last = {"done": True, "done_reason": "stop", "prompt_eval_count": 7, "eval_count": 5, "total_duration": 11}
            try:
                for piece in double.says:
                    said = {"role": "assistant", "content": piece} if key == "message" else piece
                    self._line(piece if isinstance(piece, dict) else {key: said, "done": False})
                while double.endless:
                    self._line({key: "x" if key == "response" else {"content": "x"}, "done": False})
                if double.breaks:
                    self.close_connection = True
                    return
                if not any(isinstance(piece, dict) for piece in double.says):
                    self._line({key: "" if key == "response" else {"content": ""}, **last})
                self.wfile.write(b"0\r\n\r\n")
            except OSError:
                double.gone.set()

        def _line(self, value: dict[str, Any]) -> None:
            data = json.dumps(value).encode() + b"\n"
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@contextlib.contextmanager
def engine(folder: Path, **fields: Any) -> Iterator[Double]:
    double = Double(str(write_gguf(folder / "lamp.gguf")), **fields)
    server = _Server(("127.0.0.1", 0), _handler(double))
    double.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield double
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def helped(
    url: str, *, help: Help = "needed", more: frozenset[More] = frozenset(), renderer: Renderer | None = None,
    patterns: tuple[str, ...] = ("*-abliterated",), **arguments: Any,
) -> Iterator[tuple[Running, Assist]]:  # fmt: skip
    """A proxy before `url` that helps."""
    with proxy(url, steering=Steering(patterns=patterns, observe=True), **arguments) as running:
        assist = Assist(help=help, more=more, renderer=renderer)
        running.proxy.assistant, running.proxy.wanted = assist, assist.wanted
        armed = threading.Event()
        running.loop.call_soon_threadsafe(lambda: (running.proxy.arm(), armed.set()))
        assert armed.wait(60)
        try:
            yield running, assist
        finally:
            asyncio.run_coroutine_threadsafe(assist.close(), running.loop).result(60)
