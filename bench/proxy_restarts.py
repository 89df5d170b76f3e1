"""Restarts under load: `abliterated proxy` is told to hand its sockets on, again and again, while clients ask.

Half of the clients keep their connections, half make one for each request; some read long streams. Counted: requests
answered and failed, streams whole and broken. Does not know what it costs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from abliterated.proxy.server import new_event_loop
from bench import proxy_servers as servers
from bench.proxy_loads import GET, chat

CLIENTS = 16
STREAMS = 6
PAUSE = 0.8  # seconds between a successor's start and the next restart


class Counts:
    def __init__(self) -> None:
        self.answered = self.failed = self.whole = self.broken = 0
        self.first_failure = ""

    def fail(self, what: str) -> None:
        self.failed += 1
        self.first_failure = self.first_failure or what


async def ask(port: int, keep: bool, counts: Counts, stop: asyncio.Event) -> None:
    """Requests one after the other; a connection is left when the answer says so."""
    while not stop.is_set():
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError as error:
            counts.fail(f"connect: {error}")
            continue
        with contextlib.closing(writer):
            while not stop.is_set():
                try:
                    writer.write(GET)
                    head = await reader.readuntil(b"\r\n\r\n")
                    await reader.readexactly(20)
                except (OSError, asyncio.IncompleteReadError) as error:
                    counts.fail(f"{'kept' if keep else 'new'}: {error!r}")
                    break
                counts.answered += 1
                if not keep or b"connection: close" in head.lower():
                    break


async def stream(port: int, counts: Counts, stop: asyncio.Event) -> None:
    """Streams of two seconds, each on a connection of its own."""
    tokens = 100
    whole = len(servers.STREAM_HEAD) + tokens * len(servers.TOKEN) + len(servers.END)
    while not stop.is_set():
        size = 0
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.closing(writer):
                writer.write(chat(50, tokens))
                while size < whole and (data := await reader.read(65536)):
                    size += len(data)
                    if data.endswith(servers.END):
                        break
        except OSError as error:
            counts.fail(f"stream: {error!r}")
        # A draining proxy says "Connection: close" in the heads it lets through.
        if size in (whole, whole + len(b"Connection: close\r\n")):
            counts.whole += 1
        else:
            counts.broken += 1


async def load(port: int, log: Path, first: int, restarts: int, counts: Counts) -> list[int]:
    stop = asyncio.Event()
    tasks = [asyncio.create_task(ask(port, number % 2 == 0, counts, stop)) for number in range(CLIENTS)]
    tasks += [asyncio.create_task(stream(port, counts, stop)) for _ in range(STREAMS)]
    pids = [first]
    await asyncio.sleep(PAUSE)
    for number in range(1, restarts + 1):
        os.kill(pids[-1], signal.SIGHUP)
        deadline = time.monotonic() + 30
        while len(found := successors(log)) < number:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no successor came: {log.read_text()[-500:]}")
            await asyncio.sleep(0.02)
        pids.append(found[-1])
        await asyncio.sleep(PAUSE)
    stop.set()
    await asyncio.gather(*tasks)
    return pids


def successors(log: Path) -> list[int]:
    lines = log.read_text().splitlines()
    return [int(line.split("pid ")[1].split()[0]) for line in lines if "serves now" in line]


def measure(restarts: int) -> dict[str, float]:
    """Counts after so many restarts."""
    upstream, port = servers.free_port(), servers.free_port()
    counts = Counts()
    with tempfile.TemporaryDirectory() as folder, servers.process(servers.serve_upstream, upstream, port=upstream):
        log = Path(folder, "log")
        command = [sys.executable, "-m", "abliterated.cli", "proxy", "--listen", f"127.0.0.1:{port}"]
        with log.open("ab") as out:
            child = subprocess.Popen(
                [*command, "--upstream", f"http://127.0.0.1:{upstream}"], stdin=subprocess.DEVNULL, stderr=out
            )
        pids = [child.pid]
        try:
            servers.wait_for(port)
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                pids = runner.run(load(port, log, child.pid, restarts, counts))
        finally:
            for pid in {*pids, *successors(log)}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            child.wait(40)
    if counts.first_failure:
        sys.stderr.write(f"first failure: {counts.first_failure}\n")
    return {
        "restarts": restarts,
        "requests": counts.answered,
        "failed": counts.failed,
        "streams_whole": counts.whole,
        "streams_broken": counts.broken,
    }
