"""The runners: which models are loaded, for how long, and room for the next.

At most three models are loaded; loads happen one at a time; the least recently used idle runner makes room. A runner
whose options changed is started anew once nobody uses it. Unloading is ending the process.
Does not know: what is asked of a runner, Ollama's API.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from abliterated.engine.errors import LoadFailed, RunnerDied
from abliterated.engine.options import Load
from abliterated.engine.runner import Settings
from abliterated.shapes.refusals import Refused

log = logging.getLogger(__name__)

MOST = 3
_FOLDER = "abliterated-engine-"
_CANNOT_OPEN = "Convert it again with a current llama.cpp, or give another GGUF"


@dataclass(frozen=True)
class Want:
    """What a request needs loaded. `name` and `digest` are only told (`/api/ps`); the rest decides whether a runner
    fits.
    """

    name: str
    digest: str
    path: Path
    load: Load
    projector: Path | None = None
    embedding: bool = False
    pooling: int | None = None

    @property
    def slot(self) -> tuple[Path, bool]:
        return (self.path, self.embedding)

    def fits(self, other: Want) -> bool:
        return (self.slot, self.load, self.projector) == (other.slot, other.load, other.projector)


class Runner:
    def __init__(self, want: Want, socket: Path) -> None:
        self.want = want
        self.socket = socket
        self.users = 0
        self.retiring = False  # somebody waits to have it loaded otherwise: it takes nobody new
        self.keep: float | None = 0.0
        self.used = time.monotonic()
        self.expires: float | None = None  # wall clock; None is never
        self.load_seconds = 0.0
        self.gpu = False
        self.process: asyncio.subprocess.Process | None = None
        self.ended = asyncio.Event()
        self.errors: deque[str] = deque(maxlen=40)
        self.timer: asyncio.TimerHandle | None = None
        self.session: aiohttp.ClientSession | None = None
        self.ready: asyncio.Task[None] = asyncio.create_task(self._start())

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else None

    @property
    def loaded(self) -> bool:
        return (
            self.ready.done()
            and not self.ready.cancelled()
            and self.ready.exception() is None
            and not self.ended.is_set()
        )

    async def _start(self) -> None:
        began = time.monotonic()
        want = self.want
        settings = Settings(
            model=str(want.path),
            socket=str(self.socket),
            parent=os.getpid(),
            context=want.load.context,
            projector=str(want.projector or ""),
            batch=want.load.batch,
            gpu_layers=want.load.gpu_layers,
            threads=want.load.threads,
            embedding=want.embedding,
            pooling=want.pooling,
        )
        self.process = await spawn(settings)
        asyncio.create_task(self._listen(self.process))  # noqa: RUF006 - ends with the process
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        if not line:
            await self.ended.wait()
            raise LoadFailed(self.reason())
        self.gpu = b'"gpu": true' in line
        self.session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(path=str(self.socket), limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
        )
        self.load_seconds = time.monotonic() - began
        log.info("model loaded", extra={"action": "load", "model": want.name, "seconds": round(self.load_seconds, 3)})

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while line := await _line(process.stderr):
            self.errors.append(line.decode("utf-8", "replace").strip())
        await process.wait()
        self.ended.set()

    def reason(self) -> str:
        return why(self.process.returncode if self.process else None, self.errors)

    async def died(self) -> RunnerDied | None:
        """The error to give if the process has ended (or is about to), else None."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.ended.wait(), 1.0)
        return RunnerDied(self.reason()) if self.ended.is_set() else None

    async def stop(self) -> None:
        if self.timer:
            self.timer.cancel()
        if not self.ready.done():
            self.ready.cancel()
        if self.process and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
            self.ended.set()
        if self.session:
            await self.session.close()
        self.socket.unlink(missing_ok=True)


class Pool:
    def __init__(self) -> None:
        self.runners: dict[tuple[Path, bool], Runner] = {}
        self.changed = asyncio.Condition()
        self.closed = False
        self._number = 0
        self._tasks: set[asyncio.Task[None]] = set()
        sweep(Path(tempfile.gettempdir()))
        self.folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-"))

    @contextlib.asynccontextmanager
    async def lease(self, want: Want, keep: float | None) -> AsyncIterator[Runner]:
        """A loaded runner for as long as the block lasts; afterwards it stays `keep` seconds (None: for ever)."""
        runner = await self._take(want)
        try:
            await asyncio.shield(runner.ready)
            yield runner
        finally:
            await self._release(runner, keep)

    async def _take(self, want: Want) -> Runner:
        async with self.changed:
            while not self.closed:
                runner = self.runners.get(want.slot)
                if runner and not runner.ended.is_set() and not runner.retiring and runner.want.fits(want):
                    runner.users += 1
                    return runner
                loading = any(not other.ready.done() for other in self.runners.values())
                if runner and (runner.ended.is_set() or runner.users == 0):
                    await self._drop(runner)
                elif not runner and not loading and len(self.runners) < MOST:
                    self._number += 1
                    runner = Runner(want, self.folder / f"{self._number}.sock")
                    runner.ready.add_done_callback(self._loaded)
                    self.runners[want.slot] = runner
                elif not runner and not loading and (idle := [r for r in self.runners.values() if r.users == 0]):
                    await self._drop(min(idle, key=lambda r: r.used))
                else:
                    if runner:
                        runner.retiring = True
                    await self.changed.wait()
            raise Refused(503, "the engine is shutting down", remedy="Ask again once it is back")

    async def _release(self, runner: Runner, keep: float | None) -> None:
        async with self.changed:
            runner.users -= 1
            runner.keep = keep
            runner.used = time.monotonic()
            failed = runner.ready.done() and not runner.loaded
            if failed or (keep == 0 and runner.users == 0):
                await self._drop(runner)
            else:
                self._arm(runner)
            self.changed.notify_all()

    def _arm(self, runner: Runner) -> None:
        if runner.timer:
            runner.timer.cancel()
        runner.timer = runner.expires = None
        if runner.keep is not None:
            runner.expires = time.time() + runner.keep
            runner.timer = asyncio.get_running_loop().call_later(runner.keep, lambda: self._later(self._expire(runner)))

    async def _expire(self, runner: Runner) -> None:
        async with self.changed:
            if runner.users == 0 and self.runners.get(runner.want.slot) is runner:
                log.info("model unloaded", extra={"action": "unload", "model": runner.want.name})
                await self._drop(runner)

    async def _drop(self, runner: Runner) -> None:
        if self.runners.get(runner.want.slot) is runner:
            del self.runners[runner.want.slot]
        await runner.stop()
        self.changed.notify_all()

    async def unload(self, path: Path) -> None:
        """End what holds that model; at once where it is idle, else when its last request ends."""
        async with self.changed:
            for runner in [runner for runner in self.runners.values() if runner.want.path == path]:
                runner.keep = 0.0
                if runner.users == 0:
                    await self._drop(runner)

    async def probe(self, path: Path) -> None:
        """See whether llama.cpp opens the model, in a process that ends at once. Raises Refused."""
        socket = self.folder / "probe.sock"
        process = await spawn(Settings(str(path), str(socket), os.getpid(), context=64, probe=True))
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            output, errors = await asyncio.gather(process.stdout.read(), process.stderr.read())
            if not output:
                await process.wait()
                reason = why(process.returncode, deque(errors.decode("utf-8", "replace").splitlines()))
                raise Refused(400, f"llama.cpp can't open the model: {reason}", remedy=_CANNOT_OPEN)
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
            socket.unlink(missing_ok=True)

    def _loaded(self, ready: asyncio.Task[None]) -> None:
        if not ready.cancelled():
            ready.exception()  # seen here: whoever waited may have gone
        self._later(self._wake())

    async def _wake(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        async with self.changed:
            self.closed = True
            for runner in list(self.runners.values()):
                await self._drop(runner)
        shutil.rmtree(self.folder, ignore_errors=True)


async def spawn(settings: Settings) -> asyncio.subprocess.Process:
    """A runner. Raises Refused where there is no llama.cpp."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise Refused(500, "llama.cpp is not installed here", remedy="pip install 'abliterated[pipeline]'")
    # -P: the folder we were started in must not shadow a module.
    return await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "abliterated.engine.runner", settings.encode(),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def _line(stream: asyncio.StreamReader) -> bytes:
    try:
        return await stream.readline()
    except ValueError:  # longer than the buffer: that much of it is dropped
        return b"(a line too long)\n"


def why(code: int | None, errors: deque[str]) -> str:
    """One line on why a runner ended: llama.cpp's own words where it left some."""
    for line in reversed(errors):
        for mark in ("error loading model: ", "GGML_ASSERT", "GGML_ABORT", "what():  "):
            if mark in line:
                return line[line.index(mark) :].removeprefix("error loading model: ").strip()
    if code is not None and code < 0:
        try:
            return f"signal: {signal.Signals(-code).name}"
        except ValueError:
            return f"signal: {-code}"
    return f"exit status {code}" + (f" ({errors[-1]})" if errors else "")


def sweep(folder: Path) -> None:
    """Remove what engines that were killed left in the temporary folder."""
    for path in folder.glob(f"{_FOLDER}*-*"):
        pid = path.name.removeprefix(_FOLDER).partition("-")[0]
        with contextlib.suppress(OSError):
            if pid.isdigit() and path.stat().st_uid == os.getuid() and not _alive(int(pid)):
                shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
