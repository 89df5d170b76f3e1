"""A console script in a terminal of its own, typed into as a person does."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import termios
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from client.conftest import ABLITERATE


@dataclass
class Terminal:
    """`seen` is all that was printed so far, `place` how much of it was waited for."""

    pid: int
    descriptor: int
    seen: str = ""
    place: int = 0

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def until(self, words: str, seconds: float = 60) -> str:
        """Wait until `words` are printed behind what an earlier call waited for; returns all until there."""
        begun, deadline = self.place, time.monotonic() + seconds
        while (at := self.seen.find(words, begun)) < 0:
            assert time.monotonic() < deadline, f"waited in vain for {words!r}:\n{self.seen[begun:]}"
            if not self._read(0.2):
                assert words in self.seen[begun:], f"it ended without {words!r}:\n{self.seen[begun:]}"
        self.place = at + len(words)
        return self.seen[begun : self.place]

    def interrupt_until(self, words: str) -> str:
        """Press Ctrl-C, as often as a person would: Python misses one that comes between its prompt and its first
        look at the keys, until something else is pressed."""
        deadline = time.monotonic() + 60
        while True:
            self.type("\x03")
            try:
                return self.until(words, 5)
            except AssertionError:
                if time.monotonic() > deadline:
                    raise

    def left(self) -> int:
        """Press Ctrl-C, as often as a person would; its exit code."""
        deadline = time.monotonic() + 60
        while True:
            self.type("\x03")
            try:
                return self.ended(10)
            except AssertionError:
                if time.monotonic() > deadline:
                    raise

    def ended(self, seconds: float = 60) -> int:
        """Its exit code, after it has left."""
        deadline = time.monotonic() + seconds
        while self._read(0.1):
            assert time.monotonic() < deadline, f"it goes on:\n{self.seen[-500:]}"
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def _read(self, seconds: float) -> bool:
        """Whether it may print more."""
        if not select.select([self.descriptor], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self.descriptor, 65536)
        except OSError:  # Linux says so at the end
            return False
        self.seen += data.decode("utf-8", "replace")
        return bool(data)


@contextlib.contextmanager
def terminal(*args: str, environment: Mapping[str, str]) -> Iterator[Terminal]:
    """Start `abliterate args` in a terminal; it never outlives the block."""
    pid, descriptor = pty.fork()
    if pid == 0:
        os.execve(ABLITERATE, ["abliterate", *args], {"TERM": "xterm", **environment})
    termios.tcsetwinsize(descriptor, (24, 100))
    made = Terminal(pid, descriptor)
    try:
        yield made
    finally:
        if made.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(made.pid, signal.SIGKILL)
            os.waitpid(made.pid, 0)
        os.close(descriptor)
