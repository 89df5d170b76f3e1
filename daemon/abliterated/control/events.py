"""Server-sent events: every change of a job to whoever listens; a slow listener loses progress, never a transition.

Does not know HTTP routes or the journal.
"""

from __future__ import annotations

import asyncio
from collections import deque

import msgspec

from abliterate.contract.messages import JobView

BACKLOG = 256
HEARTBEAT_SECONDS = 15.0


class Listener:
    """One client's queue. `number` 0 is progress: only the newest of a job is kept."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, JobView]] = deque()
        self._rung = asyncio.Event()
        self.lost = False

    def put(self, view: JobView, number: int) -> None:
        if number == 0:
            for index, (old, known) in enumerate(self._waiting):
                if old == 0 and known.id == view.id:
                    self._waiting[index] = (0, view)
                    return
        if len(self._waiting) >= BACKLOG:
            self.lost = True
        else:
            self._waiting.append((number, view))
        self._rung.set()

    async def take(self) -> list[tuple[int, JobView]]:
        """What has come; an empty list after a heartbeat's time without anything."""
        try:
            await asyncio.wait_for(self._rung.wait(), HEARTBEAT_SECONDS)
        except TimeoutError:
            return []
        self._rung.clear()
        taken = list(self._waiting)
        self._waiting.clear()
        return taken


class Events:
    """All listeners. `publish` is cheap where nobody listens."""

    def __init__(self) -> None:
        self._listeners: set[Listener] = set()

    def publish(self, view: JobView, number: int) -> None:
        for listener in self._listeners:
            listener.put(view, number)

    def listen(self) -> Listener:
        listener = Listener()
        self._listeners.add(listener)
        return listener

    def leave(self, listener: Listener) -> None:
        self._listeners.discard(listener)


def frame(number: int, view: JobView) -> bytes:
    """One event as SSE."""
    head = f"id: {number}\n" if number else ""
    return f"{head}event: job\ndata: ".encode() + msgspec.json.encode(view) + b"\n\n"
