"""The proxy in the daemon's own process while a 2 GB model goes to the engine from there, as registration does it:
hashed and uploaded again and again, by turns with nothing else to do.

The machine's processors are shared by all (the loads, the engine's stand-in): what the upload takes from those is not
the proxy's, but is in the figures. Does not know what registration asks besides.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from abliterated.ollama.aside import aside
from abliterated.ollama.client import OllamaClient, hash_file
from abliterated.proxy.server import Proxy, Steering, new_event_loop
from bench import proxy_loads as loads
from bench import proxy_servers as servers
from bench.proxy_bars import Row

SIZE = 2 << 30


def serve_registering(port: int, upstream: int, model: str) -> None:
    """`model` is registered while it has a file beside it called `now`."""
    path = Path(model)
    wanted = path.with_name("now")

    async def once() -> None:
        async with OllamaClient(f"http://127.0.0.1:{upstream}") as client:
            while True:
                await client.push_blob(path, await aside(hash_file, path))

    async def register() -> None:
        while True:
            while not wanted.exists():
                await asyncio.sleep(0.05)
            task = asyncio.create_task(once())
            while wanted.exists():
                await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def main() -> None:
        proxy = Proxy(f"127.0.0.1:{port}", f"http://127.0.0.1:{upstream}", steering=Steering(observe=True))
        proxy.assistant = servers.no_help
        proxy.arm()
        await proxy.start()
        await register()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main())
    sys.exit(0)


class Engine(servers.Ollama):
    """Has no blob yet."""

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"HEAD "):
            self.transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        else:
            super().data_received(data)


def serve_engine(port: int) -> None:
    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", port, backlog=4096)
        await server.serve_forever()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main())


def measure(quick: bool) -> list[Row]:
    """Ratios of busy to idle, medians over interleaved rounds; the disconnect's is a time."""
    found: dict[str, dict[str, list[float]]] = {"idle": {}, "busy": {}}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        model = Path(folder, "model.gguf")
        with model.open("wb") as file:
            file.truncate((SIZE >> 3) if quick else SIZE)
        engine, port = servers.free_port(), servers.free_port()
        stack.enter_context(servers.process(serve_engine, engine, port=engine))
        pid = stack.enter_context(servers.process(serve_registering, port, engine, str(model), port=port))
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            for _ in range(3 if quick else 8):
                for name, row in found.items():
                    if name == "busy":
                        model.with_name("now").touch()
                    else:
                        model.with_name("now").unlink(missing_ok=True)
                    time.sleep(1.0)  # hashing and sending go by turns; both are met
                    row.setdefault("get_p50_us", []).append(loads.latency(port, 1.0))
                    row.setdefault("requests_per_second_64", []).append(runner.run(loads.throughput(port, pid, 1.0))[0])
                    lost = sorted(loads.disconnects(port, engine, 30))
                    row.setdefault("disconnect_ms", []).append(lost[-1])
    idle, busy = ({key: median(values) for key, values in found[name].items()} for name in ("idle", "busy"))
    return [
        Row("get_p50_us: while 2 GB are registered/idle", busy["get_p50_us"] / idle["get_p50_us"], "<=", 1.15),
        Row(
            "requests_per_second_64: while 2 GB are registered/idle",
            busy["requests_per_second_64"] / idle["requests_per_second_64"], ">=", 0.85,
        ),
        Row("disconnect worst of 30, ms: while 2 GB are registered", busy["disconnect_ms"], "<=", 5 * 1.15),
    ]  # fmt: skip
