"""Our side of the helper process: started when first asked, stopped when nobody has asked for a while.

One question at a time; one that takes too long costs the process its life, and the next gets a new one.
Does not know: templates.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from typing import Final

import msgspec

from abliterate.contract.errors import EngineRefused
from abliterated.proxy.tools.helper import Learn, Learnt, Render, Reply

log = logging.getLogger(__name__)

SECONDS: Final = 10.0  # for one question; a long conversation takes a few milliseconds
IDLE_SECONDS: Final = 120.0
_LONGEST: Final = 256 << 20


class CannotRender(EngineRefused):
    """The template refuses this conversation, takes too long, or its file can't be read."""


class Renderer:
    """Inside a running loop; `close` at the end."""

    def __init__(self, *, seconds: float = SECONDS, idle_seconds: float = IDLE_SECONDS) -> None:
        self._seconds = seconds
        self._idle_seconds = idle_seconds
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._idle: asyncio.TimerHandle | None = None
        self._stopping: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def learn(self, path: str, name: str) -> Learnt:
        """What the GGUF at `path` says. Raises CannotRender."""
        reply = await self._ask(Learn(path, name))
        assert reply.learnt is not None
        return reply.learnt

    async def render(self, question: Render) -> str:
        """The prompt. Raises CannotRender."""
        return (await self._ask(question)).prompt

    async def close(self) -> None:
        async with self._turn:
            await self._stop()

    async def _ask(self, question: Learn | Render) -> Reply:
        line = msgspec.json.encode(question) + b"\n"
        async with self._turn:
            if self._idle is not None:
                self._idle.cancel()
            try:
                said = await asyncio.wait_for(self._exchange(line), self._seconds)
            except TimeoutError as error:
                await self._stop()
                raise CannotRender(
                    f"the model's chat template took more than {self._seconds:g} s",
                    remedy="`abliterated doctor` tells more",
                ) from error
            except (OSError, ValueError) as error:  # a line beyond the limit is a ValueError
                await self._stop()
                raise CannotRender(f"the rendering process failed: {error}", remedy="Ask again") from error
            except BaseException:
                await self._stop()  # the answer to a question nobody waits for must not be the next one's
                raise
            self._idle = asyncio.get_running_loop().call_later(self._idle_seconds, self._go_idle)
        reply = msgspec.json.decode(said, type=Reply)
        if reply.refused:
            raise CannotRender(reply.refused, remedy="`abliterated doctor` tells more")
        return reply

    async def _exchange(self, line: bytes) -> bytes:
        process = self._process
        if process is None or process.returncode is not None:
            process = self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "abliterated.proxy.tools.helper",
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
                limit=_LONGEST, start_new_session=True,
            )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(line)
        await process.stdin.drain()
        said = await process.stdout.readline()
        if not said.endswith(b"\n"):
            raise OSError("it ended")
        return said

    def _go_idle(self) -> None:
        self._stopping = asyncio.get_running_loop().create_task(self._stop_when_free())

    async def _stop_when_free(self) -> None:
        if not self._turn.locked():
            await self.close()

    async def _stop(self) -> None:
        process, self._process = self._process, None
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            process.kill()
        await process.wait()
        if process.stdin is not None:
            process.stdin.close()
