"""Bytes written, digested and copied by threads of their own, while the next are worked out.

A thread each writes and digests, in the order asked for. Copies have one too where the output takes several writers at
once; where they would wait on each other inside the kernel, the one that writes copies as well, in the same order.
Knows no formats, and nothing of what the bytes mean.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Final, TypeAlias

import numpy as np

from abliterated.pipeline.past_cache import GRAIN
from abliterated.pipeline.safe_write import Bytes, Output, Room, Source

AHEAD: Final = 3  # results that may be in memory at a time: one being worked out, others being written and digested


Works: TypeAlias = tuple[Future[None], ...]


class Digest:
    """A sha256 of bytes still to be written."""

    def __init__(self) -> None:
        self._sum = hashlib.sha256()
        self.last: Works = ()

    def hexdigest(self) -> str:
        """The digest, when all its bytes are on their way. Raises what writing them raised."""
        for work in self.last:
            work.result()
        return self._sum.hexdigest()

    def add(self, data: Bytes) -> None:
        """The next bytes."""
        self._sum.update(data.data)


class WriteBehind:
    """Threads that write to one output. What they fail with is raised by a call that follows."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._writer, self._digester = _thread(), _thread()
        self._copier = _thread() if output.parallel else self._writer
        self._read, self._written = Room(), [Room() for _ in range(AHEAD)]
        self._using: list[Works] = [()] * AHEAD
        self._turn = 0
        self._pending: deque[Future[None]] = deque()
        self._copied: deque[int] = deque()
        self._stopped = False

    def rooms(self) -> tuple[Room, Room]:
        """Memory to read into until `rooms` is called again, and to write from until it was `AHEAD` times."""
        self._turn = (self._turn + 1) % AHEAD
        for work in self._using[self._turn]:
            work.result()
        written = self._written[self._turn]
        written.phase = self._output.at % GRAIN
        return self._read, written

    def put(self, data: Bytes, digest: Digest) -> None:
        """Write all of it at the output's position, which moves on at once. `data` may lie in the rooms last given."""
        at, flat = self._output.at, np.ascontiguousarray(data).reshape(-1)

        def write() -> None:
            self._output.put(flat, at)

        def add() -> None:
            digest.add(flat)

        self._output.seek(at + flat.size)
        self._using[self._turn] = digest.last = (self._submit(self._writer, write), self._submit(self._digester, add))

    def copy(self, source: Source, start: int, size: int, at: int) -> None:
        """Copy bytes of a file to a place in the output; `copied` tells how far it is."""

        def work() -> None:
            for count in source.copy(start, size, self._output, at):
                self._copied.append(count)
                if self._stopped:
                    return

        self._submit(self._copier, work)

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
        """Let the threads end; after a failure nothing more is begun. Raises what was not raised yet."""
        self._stopped = failed
        for thread in (self._writer, self._digester, self._copier):
            thread.shutdown(wait=True, cancel_futures=failed)
        if not failed:
            self.wait()

    def _submit(self, thread: ThreadPoolExecutor, work: Callable[[], None]) -> Future[None]:
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()
        future = thread.submit(work)
        self._pending.append(future)
        return future


def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="write-behind")
