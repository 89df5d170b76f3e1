"""Keeps the embedded engine alive: a process of its own, started by the daemon, restarted when it dies.

Part of the wiring. Never imports the engine: a failed assertion there ends that process, not this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

from abliterate.contract.errors import AlreadyRunning

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 30.0
STEADY_SECONDS = 60.0
# An engine whose daemon was killed holds its port for a moment; somebody else holds it for longer.
PORT_PATIENCE = 10.0


class EngineProcess:
    """`run()` until `stop()`. `ready` is called each time it was started."""

    def __init__(self, url: str, models: Path, output: Path, ready: Callable[[], Awaitable[None]]) -> None:
        parts = urlsplit(url)
        self._listen = f"{parts.hostname or '127.0.0.1'}:{parts.port or 80}"
        self._models = models
        self._output = output
        self._ready = ready
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Start it, wait for its end, start it again: at once after a long life, slowly after short ones.

        Raises AlreadyRunning where somebody else keeps its port.
        """
        pause = FIRST_PAUSE
        loop = asyncio.get_running_loop()
        refused_since: float | None = None
        while not self._stopping.is_set():
            born = loop.time()
            status = await self._live()
            if self._stopping.is_set():
                return
            refused_since = (refused_since or born) if status == AlreadyRunning.exit_code else None
            if refused_since is not None and loop.time() - refused_since > PORT_PATIENCE:
                raise AlreadyRunning(
                    f"{self._listen}: taken by another program, so the embedded engine can't listen there",
                    remedy='Stop that program, set proxy.upstream to another port, or engine.kind = "ollama"',
                )
            pause = FIRST_PAUSE if loop.time() - born > STEADY_SECONDS else min(LONGEST_PAUSE, pause * 2)
            log.error(
                "the embedded engine ended with %s (see %s); starts again in %.1f s",
                status,
                self._output,
                pause,
                extra={"action": "engine"},
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)

    async def stop(self) -> None:
        self._stopping.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 5)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    async def _live(self) -> int:
        parent_read, alive = os.pipe()
        log_file = os.open(self._output, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "abliterated.engine",
                "--listen",
                self._listen,
                "--models",
                str(self._models),
                "--parent-fd",
                str(parent_read),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                pass_fds=(parent_read,),
                start_new_session=True,
            )
        finally:
            os.close(parent_read)
            os.close(log_file)
        try:
            await self._answering(self._process)
            return await self._process.wait()
        finally:
            os.close(alive)

    async def _answering(self, process: asyncio.subprocess.Process) -> None:
        host, _, port = self._listen.rpartition(":")
        while process.returncode is None and not self._stopping.is_set():
            try:
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            except OSError:
                await asyncio.sleep(0.05)
                continue
            writer.close()
            # Whoever answered must be ours: with its port taken the engine ends at once.
            try:
                await asyncio.wait_for(process.wait(), 0.3)
                return
            except TimeoutError:
                pass
            log.info("the embedded engine answers on %s", self._listen, extra={"action": "engine"})
            await self._ready()
            return
