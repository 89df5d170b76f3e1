"""Jobs as they change: the daemon's event stream read in a thread, polling where there is none.

A daemon that goes away meanwhile is waited for a while, so that a job survives its daemon's restart in the eyes of
whoever watches. Does not draw.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Final

from abliterate.api import Daemon, ProtocolError, Stream
from abliterate.contract.errors import AbliteratedError, DaemonUnavailable, NotFound
from abliterate.contract.messages import JobView
from abliterate.contract.states import TERMINAL

PATIENCE: Final = 60.0
POLL: Final = 1.0

# How `wait` and every `--watch` of one job exit.
EXIT_CODES: Final = {"succeeded": 0, "failed": 1, "rejected": 2, "cancelled": 86}
SHORT_OF_TARGET: Final = 8
TIMED_OUT: Final = 124


def exit_code(jobs: Sequence[JobView]) -> int:
    """The worst of the outcomes: failed, then rejected, then cancelled, then delivered but short of its target."""
    codes = {EXIT_CODES.get(job.state, 1) for job in jobs}
    if any(job.state == "succeeded" and job.result and job.result.short_of_target > 0 for job in jobs):
        codes.add(SHORT_OF_TARGET)
    return next((code for code in (1, 2, 86, SHORT_OF_TARGET) if code in codes), 0)


class Feed:
    """The jobs `ids` (all jobs, if None), first as they are, then at every change. A context manager."""

    def __init__(
        self, daemon: Daemon, ids: Sequence[str] | None, *, patience: float = PATIENCE, poll: float = POLL
    ) -> None:
        self._daemon = daemon
        self._ids = None if ids is None else frozenset(ids)
        self._patience = patience
        self._poll = poll
        self._queue: queue.SimpleQueue[JobView | AbliteratedError] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._stream: Stream | None = None
        self._answered = 0.0
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)

    def __enter__(self) -> Feed:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._stream is not None:
            self._stream.close()
        self._thread.join(1.0)

    def next(self, timeout: float | None = None) -> JobView | None:
        """The next job that changed; None when `timeout` seconds brought none. Raises what ended the feed."""
        try:
            item = self._queue.get(timeout=timeout if timeout is None else max(0.0, timeout))
        except queue.Empty:
            return None
        if isinstance(item, AbliteratedError):
            raise item
        return item

    def _run(self) -> None:
        self._answered = time.monotonic()
        events = True
        while not self._stop.is_set():
            try:
                if events:
                    self._listen()
                else:
                    self._fetch()
            except (NotFound, ProtocolError) as error:
                if not events:
                    self._queue.put(error)
                    return
                events = False  # no event stream here: ask again and again instead
                continue
            except DaemonUnavailable as error:
                if time.monotonic() - self._answered > self._patience:
                    self._queue.put(error)
                    return
            except AbliteratedError as error:
                self._queue.put(error)
                return
            self._stop.wait(self._poll)

    def _listen(self) -> None:
        with self._daemon.events() as stream:
            self._stream = stream
            if self._stop.is_set():  # who stops us saw no stream to close
                return
            # Asked only now, with the stream open: no change falls between the two.
            self._fetch()
            for event in stream.events():
                self._answered = time.monotonic()
                if event.job is not None and (self._ids is None or event.job.id in self._ids):
                    self._queue.put(event.job)
        self._stream = None

    def _fetch(self) -> None:
        jobs = self._daemon.jobs() if self._ids is None else [self._daemon.job(job) for job in sorted(self._ids)]
        self._answered = time.monotonic()
        for job in jobs:
            self._queue.put(job)


def wait(feed: Feed, known: Sequence[JobView], deadline: float | None) -> dict[str, JobView]:
    """Wait until all of `known` have ended, or `deadline` (monotonic) has passed; returns those that have, by id.

    Who had ended before counts, however little time there is.
    """
    ids = {job.id for job in known}
    ended = {job.id: job for job in known if job.state in TERMINAL}
    while len(ended) < len(ids):
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            break
        job = feed.next(left)
        if job is None:
            continue
        if job.state in TERMINAL:
            ended[job.id] = job
        else:
            with contextlib.suppress(KeyError):
                del ended[job.id]  # retried meanwhile
    return ended
