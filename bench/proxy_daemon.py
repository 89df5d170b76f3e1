"""A real `abliterated serve` that registers one 2 GB model after another with a real engine, as long as it is asked.

Each registration is a job's: the journal holds it, the daemon finds it there as after a restart, hashes its product,
hands it over, has it certified and gives it its name. Behind the daemon's port stands one address that is two: the
loads' small upstream, and the engine for all who come to the engine.

Does not know what is measured meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import tomli_w

from abliterate.api import Daemon, Stream
from abliterate.contract.errors import AbliteratedError
from abliterate.contract.ids import new_id
from abliterate.contract.messages import JobView, Result
from abliterate.contract.paths import Home
from abliterate.contract.recipe import Recipe
from abliterated import refuser
from abliterated.jobs.journal import Journal
from abliterated.ollama.client import OllamaClient, hash_file
from abliterated.proxy.server import new_event_loop
from bench import proxy_servers as servers

BASE = "base:1"
PATIENCE = 120.0


class Either(servers.Ollama):
    """The loads' upstream, until somebody asks for the engine: then that connection is the engine's."""

    engine = 0
    _LOADS = (b"GET /lost/", b"POST /api/blobs/sha256:0 ")
    _SIGNS = (b"\r\nUser-Agent: bench\r\n", b"\r\nX-Pace: ")

    def data_received(self, data: bytes) -> None:
        if data.startswith(self._LOADS) or any(sign in data for sign in self._SIGNS):
            super().data_received(data)
        else:
            Wire(self.transport, self.engine, data)


class Wire(asyncio.Protocol):
    """A connection and the engine's, joined."""

    def __init__(self, client: asyncio.Transport, engine: int, first: bytes) -> None:
        self.ends: list[asyncio.Transport] = [client]
        self.early = [first]
        client.set_protocol(End(self, 0))
        loop = asyncio.get_running_loop()
        self.task = loop.create_task(loop.create_connection(lambda: End(self, 1), "127.0.0.1", engine))

    def connected(self, transport: asyncio.Transport) -> None:
        self.ends.append(transport)
        transport.writelines(self.early)
        if self.ends[0].is_closing():
            transport.close()


class End(asyncio.Protocol):
    def __init__(self, wire: Wire, place: int) -> None:
        self.wire, self.place = wire, place

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.wire.connected(cast(asyncio.Transport, transport))

    def data_received(self, data: bytes) -> None:
        if len(self.wire.ends) < 2:
            self.wire.early.append(data)
        else:
            self.wire.ends[1 - self.place].write(data)

    def pause_writing(self) -> None:
        if len(self.wire.ends) == 2:
            self.wire.ends[1 - self.place].pause_reading()

    def resume_writing(self) -> None:
        if len(self.wire.ends) == 2:
            self.wire.ends[1 - self.place].resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        for end in self.wire.ends:
            end.close()


def serve_either(port: int, engine: int) -> None:
    Either.engine = engine

    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(Either, "127.0.0.1", port, backlog=4096)
        await server.serve_forever()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main())


@contextlib.contextmanager
def daemon(folder: Path, port: int, upstream: int) -> Iterator[int]:
    """`abliterated serve` in a home of its own; its pid."""
    config = folder / "config.toml"
    settings = {
        "paths": {"state": str(folder / "state")},
        "proxy": {"listen": f"127.0.0.1:{port}", "upstream": f"http://127.0.0.1:{upstream}"},
        "engine": {"kind": "ollama"},
    }
    config.write_text(tomli_w.dumps(settings))
    command = [sys.executable, "-m", "abliterated.cli", "serve", "--config", str(config)]
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            servers.wait_for(port)
            yield process.pid
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


class Registering:
    """What the process that keeps the daemon busy has seen; `busy`: the share of the time a model was registered."""

    def __init__(self, told: Path) -> None:
        self._told = told

    @property
    def _seen(self) -> dict[str, float | str]:
        try:
            found: dict[str, float | str] = json.loads(self._told.read_text())
        except FileNotFoundError:
            return {}
        if error := found.get("error"):
            raise SystemExit(f"the registration ended with: {error}")
        return found

    def wait(self) -> None:
        """Until the first is under way."""
        deadline = time.monotonic() + PATIENCE
        while not self._seen.get("begun"):
            if time.monotonic() > deadline:
                raise SystemExit("no registration began")
            time.sleep(0.05)

    @property
    def ended(self) -> int:
        return int(self._seen.get("ended", 0))

    @property
    def busy(self) -> float:
        seen, now = self._seen, time.monotonic()
        passed = float(seen["busy"]) + (now - float(seen["since"]) if seen["since"] else 0)
        return passed / (now - float(seen["begun"]))


@contextlib.contextmanager
def registering(folder: Path, product: Path, engine: int) -> Iterator[Registering]:
    """One after another, from when it is entered until it is left."""
    asyncio.run(_make_base(engine))
    told = folder / "registering.json"
    keeper = multiprocessing.get_context("spawn").Process(
        target=_keep_registering, args=(folder / "state", product, engine, told), daemon=True
    )
    keeper.start()
    try:
        yield Registering(told)
    finally:
        assert keeper.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(keeper.pid, signal.SIGTERM)
        keeper.join(10)


async def _make_base(engine: int) -> None:
    small = refuser.files()
    async with OllamaClient(f"http://127.0.0.1:{engine}") as client:
        files = {"model.gguf": await client.push_blob(small.model)}
        parameters = json.loads(small.parameters.read_text())
        template = small.template_go.read_text()
        await client.create({"model": BASE, "files": files, "template": template, "parameters": parameters})


def _keep_registering(state: Path, product: Path, engine: int, told: Path) -> None:
    home = Home(state, state / "spool")
    control = Daemon(state / "control.sock")
    control.set_paused(True)  # what is to be run waits; what was run is handed over
    journal = Journal(home.journal)
    digest = hash_file(product).removeprefix("sha256:")
    begun, busy = time.monotonic(), 0.0
    for number in itertools.count():
        name = f"made:{number}"
        job = _finished_job(journal, home, product, digest, name)
        started = time.monotonic()
        with control.events() as stream:  # as who follows a job does
            control.set_paused(True)  # it looks again
            _tell(told, {"begun": begun, "ended": number, "busy": busy, "since": started})
            view = _ended(control.job(job), stream)
        busy += time.monotonic() - started
        if view.state != "succeeded":
            _tell(told, {"error": f"{view.state}: {view.explanation}"})
            return
        _tell(told, {"begun": begun, "ended": number + 1, "busy": busy, "since": 0})
        with contextlib.suppress(AbliteratedError):
            _forget(engine, name)


def _ended(view: JobView, stream: Stream) -> JobView:
    """The job as it is once it is no longer being registered."""
    events = stream.events()
    while view.state == "registering":
        event = next(events)
        if event.job is not None and event.job.id == view.id:
            view = event.job
    return view


def _finished_job(journal: Journal, home: Home, product: Path, digest: str, name: str) -> str:
    """A job whose worker has ended."""
    job = new_id()
    out = home.jobs / job / "out"
    out.mkdir(parents=True)
    os.link(product, out / "model.gguf")
    journal.add(job, "bench", Recipe(model=f"ollama:{BASE}", name=name))
    journal.move(job, "starting")
    journal.move(job, "running")
    journal.move(job, "registering", result=Result(product="model.gguf", format="gguf", digest=digest))
    return job


def _forget(engine: int, name: str) -> None:
    """The model goes, and its blob with it: the next registration has everything to do."""
    body = json.dumps({"model": name}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{engine}/api/delete", body, method="DELETE")
    with urllib.request.urlopen(request, timeout=30):
        pass


def _tell(told: Path, what: dict[str, float | str]) -> None:
    hidden = told.with_suffix(".new")
    hidden.write_text(json.dumps(what))
    hidden.replace(told)
