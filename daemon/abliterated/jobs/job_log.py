"""A job's log, bounded: its beginning as it comes, of what is too much the end. Tokens are made unreadable.

Does not know who writes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections import deque
from pathlib import Path

HEAD_BYTES = 8 * 1024**2
TAIL_BYTES = 1024**2
LINE_BYTES = 16 * 1024
_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{8,}")


class JobLog:
    """Appends to `path` until it has HEAD_BYTES; keeps the last TAIL_BYTES of the rest until `close`."""

    def __init__(self, path: Path, head: int = HEAD_BYTES, tail: int = TAIL_BYTES) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        self._room = max(0, head - os.fstat(self._descriptor).st_size)
        self._tail: deque[bytes] = deque()
        self._kept, self._most, self._dropped = 0, tail, 0
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take what was written. Raises nothing: a full disk loses log lines and no job."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > LINE_BYTES:
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            self._put(_TOKEN.sub("hf_…".encode(), line) + b"\n")

    def close(self) -> None:
        """Write the end of what was too much."""
        if self._rest:
            self._put(_TOKEN.sub("hf_…".encode(), self._rest) + b"\n")
        if self._tail:
            mark = f"[… {self._dropped} bytes left out …]\n".encode() if self._dropped else b""
            self._write(mark + b"".join(self._tail))
            self._tail.clear()
        os.close(self._descriptor)

    def _put(self, line: bytes) -> None:
        if self._room >= len(line):
            self._room -= len(line)
            self._write(line)
            return
        self._room = 0
        self._tail.append(line)
        self._kept += len(line)
        while self._kept > self._most:
            gone = len(self._tail.popleft())
            self._kept -= gone
            self._dropped += gone

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            os.write(self._descriptor, data)


async def pump(reader: asyncio.StreamReader, log: JobLog) -> None:
    """From the worker's stdout and stderr to its log, until they end."""
    try:
        while piece := await reader.read(64 * 1024):
            log.feed(piece)
    finally:
        log.close()
