"""What help costs: 64 assisted streams with tools, beside the same streams relayed, in CPU of the proxy for each token.

The upstream says that its model can't do tools; the model's template is a small one of ours in a GGUF without tensors.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

from abliterated.proxy.alone import run
from abliterated.proxy.server import Proxy, Steering, new_event_loop
from abliterated.proxy.tools.assistant import Assist
from bench import proxy_servers as servers
from bench.proxy_loads import cpu

STREAMS, TOKENS, RATE = 64, 300, 100.0
PATHS = ("/api/chat", "/v1/chat/completions", "/v1/responses", "/v1/messages")
TEMPLATE = (
    "{%- if tools %}<|im_start|>system\n<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>"
    "<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
TOOL = {"name": "now", "description": "the time", "parameters": {"type": "object", "properties": {}}}
_LINE = b'{"model":"m","created_at":"2026-01-01T00:00:00Z","response":" word","done":false}\n'
_LAST = b'{"model":"m","response":"","done":true,"done_reason":"stop","prompt_eval_count":9,"eval_count":%d}\n'


def write_gguf(path: Path) -> Path:
    """Key-values alone: what help reads of a model."""

    def text(value: str) -> bytes:
        data = value.encode()
        return struct.pack("<Q", len(data)) + data

    pairs = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.chat_template": TEMPLATE}
    body = b"".join(text(key) + struct.pack("<I", 8) + text(value) for key, value in pairs.items())
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + body)
    return path


class Upstream(servers.Ollama):
    """Also: a model that can't do tools, and raw completions at a pace."""

    gguf = ""

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"POST /api/show"):
            said = json.dumps({"modelfile": f"FROM {self.gguf}\n", "capabilities": ["completion"]}).encode()
            head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(said)
            self.transport.write(head + said)
        elif data.startswith(b"POST /api/generate"):
            self.left = TOKENS
            self.transport.write(servers.STREAM_HEAD)
            asyncio.get_running_loop().call_later(1 / RATE, self.word)
        else:
            super().data_received(data)

    def word(self) -> None:
        if self.transport.is_closing():
            return
        self.left -= 1
        line = _LINE if self.left >= 0 else _LAST % TOKENS
        self.transport.write(b"%x\r\n%b\r\n" % (len(line), line) + (b"" if self.left >= 0 else servers.END))
        if self.left >= 0:
            asyncio.get_running_loop().call_later(1 / RATE, self.word)


def serve_upstream(port: int, gguf: str) -> None:
    Upstream.gguf = gguf

    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", port, backlog=4096)
        await server.serve_forever()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main())


def serve_assisting(port: int, upstream: int) -> None:
    proxy = Proxy(f"127.0.0.1:{port}", f"http://127.0.0.1:{upstream}", steering=Steering(observe=True))
    assist = Assist()
    proxy.assistant, proxy.wanted = assist, assist.wanted
    proxy.arm()
    sys.exit(run(proxy))


def request(path: str, model: str, *, paced: bool = False) -> bytes:
    body: dict[str, Any] = {"model": model, "stream": True}
    function = {"type": "function", "function": TOOL}
    talk = [{"role": "user", "content": "hello"}]
    match path:
        case "/v1/responses":
            body |= {"input": talk, "tools": [{"type": "function", **TOOL}]}
        case "/v1/messages":
            body |= {"messages": talk, "max_tokens": 999, "tools": [{"name": "now", "input_schema": {}}]}
        case _:
            body |= {"messages": talk, "tools": [function]}
    content = json.dumps(body).encode()
    pace = f"X-Pace: {RATE} {TOKENS}\r\n" if paced else ""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{pace}Content-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


class Listener(asyncio.Protocol):
    def __init__(self, asked: bytes) -> None:
        self.asked = asked
        self.words = 0
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self.asked)

    def data_received(self, data: bytes) -> None:
        self.words += data.count(b'" word"')
        if data.endswith(servers.END) and not self.ended.done():
            self.ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.cancel()


async def per_token(port: int, pid: int, asked: bytes) -> float:
    """CPU of the proxy in µs for each token, while all streams run."""
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(lambda: Listener(asked), "127.0.0.1", port) for _ in range(STREAMS)]
    await asyncio.sleep(0.8)
    before, used = sum(listener.words for _, listener in made), cpu(pid)
    await asyncio.sleep(TOKENS / RATE - 1.6)
    words, used = sum(listener.words for _, listener in made) - before, cpu(pid) - used
    await asyncio.gather(*(listener.ended for _, listener in made))
    for transport, _ in made:
        transport.abort()
    return used / max(words, 1) * 1e6


def measure(quick: bool) -> dict[str, float]:
    """µs for each token: relayed, and by API; `added`: the dearest of them without the relay's."""
    upstream, port = servers.free_port(), servers.free_port()
    found: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        gguf = write_gguf(Path(folder, "model.gguf"))
        stack.enter_context(servers.process(serve_upstream, upstream, str(gguf), port=upstream))
        pid = stack.enter_context(servers.process(serve_assisting, port, upstream, port=port))
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            for _ in range(1 if quick else 3):
                relayed = request("/api/chat", "qwen3:8b", paced=True)
                found.setdefault("relayed", []).append(runner.run(per_token(port, pid, relayed)))
                for path in PATHS:
                    asked = request(path, "qwen3-abliterated:8b")
                    found.setdefault(path, []).append(runner.run(per_token(port, pid, asked)))
    lowest = {name: min(values) for name, values in found.items()}
    return lowest | {"added": max(lowest[path] for path in PATHS) - lowest["relayed"]}
