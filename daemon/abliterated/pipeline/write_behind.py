"""Bytes written, digested and copied by a thread of its own, in the order asked for, while the next are worked out.

Two threads writing into one file wait on each other inside the kernel; one that does nothing else keeps the disk busy.
Knows no formats, and nothing of what the bytes mean.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Final

import numpy as np

from abliterated.pipeline.safe_write import Bytes, Output, Room, Source

AHEAD: Final = 2  # matrices that may be in memory at a time: one being worked out, one being written


class Digest:
    """A sha256 of bytes still to be written."""

    def __init__(self) -> None:
        self._sum = hashlib.sha256()
        self.last: Future[None] | None = None

    def hexdigest(self) -> str:
        """The digest, when all its bytes are on their way. Raises what writing them raised."""
        if self.last is not None:
            self.last.result()
        return self._sum.hexdigest()

    def add(self, data: Bytes) -> None:
        """The next bytes."""
        self._sum.update(data.data)


class WriteBehind:
    """A thread that writes to one output. What it fails with is raised by the next call."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write-behind")
        self._rooms = [(Room(), Room()) for _ in range(AHEAD)]
        self._using: list[Future[None] | None] = [None] * AHEAD
        self._turn = 0
        self._pending: deque[Future[None]] = deque()
        self._copied: deque[int] = deque()
        self._stopped = False

    def rooms(self) -> tuple[Room, Room]:
        """Memory to read into and to write from, until `rooms` was called `AHEAD` times more."""
        self._turn = (self._turn + 1) % AHEAD
        if (busy := self._using[self._turn]) is not None:
            busy.result()
        return self._rooms[self._turn]

    def put(self, data: Bytes, digest: Digest) -> None:
        """Write all of it at the output's position, which moves on at once. `data` may lie in the rooms last given."""
        at, flat = self._output.at, np.ascontiguousarray(data).reshape(-1)

        def work() -> None:
            self._output.put(flat, at)
            digest.add(flat)

        self._output.seek(at + flat.size)
        self._using[self._turn] = digest.last = self._submit(work)

    def copy(self, source: Source, start: int, size: int, at: int) -> None:
        """Copy bytes of a file to a place in the output; `copied` tells how far it is."""

        def work() -> None:
            for count in source.copy(start, size, self._output, at):
                self._copied.append(count)
                if self._stopped:
                    return

        self._submit(work)

    def copied(self) -> int:
        """Bytes copied since the last look."""
        total = 0
        while self._copied:
            total += self._copied.popleft()
        return total

    def wait(self, told: Callable[[int], None] = lambda count: None) -> None:
        """Until all is written; `told` the bytes copied meanwhile."""
        while self._pending:
            with suppress(TimeoutError):
                self._pending[0].result(timeout=0.1)
                self._pending.popleft()
            told(self.copied())

    def close(self, *, failed: bool) -> None:
        """Let the thread end; after a failure nothing more is begun. Raises what was not raised yet."""
        self._stopped = failed
        self._thread.shutdown(wait=True, cancel_futures=failed)
        if not failed:
            self.wait()

    def _submit(self, work: Callable[[], None]) -> Future[None]:
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()
        future = self._thread.submit(work)
        self._pending.append(future)
        return future
