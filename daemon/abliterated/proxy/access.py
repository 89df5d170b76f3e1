"""The access log, for those who ask for one: a JSON line for each exchange, written by a thread, never by the relay.

Does not know: what an exchange means.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
from pathlib import Path
from typing import Final

import msgspec

from abliterate.contract.errors import DiskError
from abliterated.proxy.marks import Mark

FLUSH_SECONDS: Final = 0.5
LINES: Final = 10_000  # kept while the disk is slow; beyond that, lines are dropped and counted


class AccessLog:
    """Opened when the proxy starts; `note` is all the relay ever calls."""

    def __init__(self, path: str) -> None:
        self._path = Path(path).expanduser()
        self._lines: list[bytes] = []
        self._dropped = 0
        self._descriptor = -1
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Future[None] | None = None

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        try:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise DiskError(
                f"{self._path}: the access log can't be opened ({error.strerror})", remedy="Check proxy.access_log"
            ) from error

    def note(self, client: str, mark: Mark, now: float, size: int) -> None:
        if mark.head is None:
            return
        if len(self._lines) >= LINES:
            self._dropped += 1
            return
        wall = datetime.datetime.now(datetime.UTC)
        line = {
            "time": wall.isoformat(timespec="milliseconds"),
            "client": client,
            "method": mark.head.method.decode("latin-1"),
            "target": mark.head.target.decode("latin-1"),
            "status": mark.status,
            "bytes": size,
            "first_byte_ms": round((mark.first - mark.began) * 1000, 3) if mark.first else None,
            "duration_ms": round((now - mark.began) * 1000, 3),
        }
        if mark.model:
            line["model"] = mark.model
        self._lines.append(msgspec.json.encode(line) + b"\n")
        if self._timer is None:
            self._timer = self._loop.call_later(FLUSH_SECONDS, self._flush)

    def _flush(self) -> None:
        self._timer = None
        if self._writing is not None and not self._writing.done():
            self._timer = self._loop.call_later(FLUSH_SECONDS, self._flush)
            return
        self._writing = self._loop.run_in_executor(None, self._write, self._take())

    def _take(self) -> bytes:
        lines, self._lines = self._lines, []
        if self._dropped:
            lines.append(msgspec.json.encode({"dropped": self._dropped}) + b"\n")
            self._dropped = 0
        return b"".join(lines)

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk must not stop the proxy
            while data:
                data = data[os.write(self._descriptor, data) :]

    async def close(self) -> None:
        """What is still unwritten, then no more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._writing is not None:
            await self._writing
        await asyncio.to_thread(self._write, self._take())
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
