"""Follows jobs before a person's eyes: drawn with rich on a terminal, a plain line a change elsewhere.

Knows the feed and the stream to draw on; does not know how the daemon is reached. Imports rich only when it draws.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Final, NoReturn

from abliterate.contract.messages import JobView, Status
from abliterate.contract.states import TERMINAL, Stage
from abliterate.follow import Feed
from abliterate.render import clean, colours, duration, job_table, percent, size, summary, terminal_width, why

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live

_STAGES: Final[tuple[Stage, ...]] = (
    "fetch",
    "load",
    "direction",
    "search",
    "edit",
    "evaluate",
    "report",
    "register",
)
_REFRESH: Final = 0.25
_QUIET: Final = 10.0  # seconds between two plain lines that differ in nothing but a number


class Pace:
    """How fast a stage goes, over the last seconds. Pure but for the times it is given."""

    def __init__(self, span: float = 15.0) -> None:
        self._span = span
        self._points: deque[tuple[float, float]] = deque()
        self._stage = ""

    def add(self, job: JobView, now: float) -> None:
        """Note how far `job` is."""
        if job.stage != self._stage or (self._points and job.done < self._points[-1][1]):
            self._points.clear()
            self._stage = job.stage
        self._points.append((now, job.done))
        while len(self._points) > 2 and now - self._points[0][0] > self._span:
            self._points.popleft()

    def text(self, unit: str) -> str:
        """Units a second; nothing where it isn't known."""
        if len(self._points) < 2:
            return ""
        (first, before), (last, after) = self._points[0], self._points[-1]
        if last - first < 0.2 or after <= before:
            return ""
        rate = (after - before) / (last - first)
        if unit in ("B", "bytes"):
            return f"{size(rate)}/s"
        return f"{rate:.3g} {clean(unit)}/s".replace(" /s", "/s")


def watch_job(feed: Feed, job: str, stream: IO[str]) -> JobView:
    """Show `job` on `stream` until it has ended; returns it as it ended."""
    live = stream.isatty()
    ended = _watch_live(feed, job, stream) if live else _watch_plain(feed, job, stream)
    stream.write(closing_line(ended) + "\n")
    stream.flush()
    return ended


def watch_queue(feed: Feed, ask: Callable[[], Status], stream: IO[str]) -> NoReturn:
    """Show all jobs on `stream` until interrupted: redrawn on a terminal, a line a change elsewhere."""
    if not stream.isatty():
        plain = _Plain(stream)
        while True:
            if (view := feed.next()) is not None:
                plain.show(view)
    from rich.live import Live
    from rich.text import Text

    with _screen(stream) as live:
        assert isinstance(live, Live)
        while True:
            status = ask()
            table = job_table(status.jobs, width=terminal_width(stream), colour=colours(stream))
            live.update(Text.from_ansi(f"{table}\n\n{summary(status)}"), refresh=True)
            # An event is a doorbell; ages move on without one.
            if feed.next(1.0) is not None:
                _drain(feed, _REFRESH)


def plain_line(job: JobView, pace: str = "") -> str:
    """What a job does now, on one line."""
    where = job.stage if job.state == "running" and job.stage else why(job)
    parts = [
        f"{job.state} {where}".strip(),
        percent(job),
        pace,
        f"{duration(job.remaining)} left" if job.remaining is not None and job.state == "running" else "",
        size(job.memory) if job.memory else "",
        job.message,
    ]
    return clean(" · ".join(part for part in parts if part))


def closing_line(job: JobView) -> str:
    """How a job ended, on one line."""
    took = duration(job.ended - job.started) if job.ended and job.started else ""
    parts = [f"{job.state}: {job.target}" if job.state == "succeeded" else f"{job.state}: {why(job)}".rstrip(": ")]
    if job.result is not None:
        before, after = (job.result.metrics.get(f"refusal_{when}") for when in ("before", "after"))
        if before is not None and after is not None:
            parts.append(f"refusal {before:.0%} → {after:.0%}")
        if job.result.short_of_target:
            parts.append(f"{job.result.short_of_target:.1%} above the target")
    if job.failure is not None and job.failure.remedy:
        parts.append(f"→ {job.failure.remedy}")
    return clean(" · ".join([*parts, took] if took else parts))


class _Plain:
    """Lines for a pipe or a log: every change of state or stage, numbers at most every few seconds."""

    def __init__(self, stream: IO[str], named: bool = True) -> None:
        self._stream = stream
        self._named = named
        self._shown: dict[str, tuple[tuple[str, ...], float, str]] = {}
        self._paces: dict[str, Pace] = {}

    def show(self, job: JobView) -> None:
        now = time.monotonic()
        pace = self._paces.setdefault(job.id, Pace())
        pace.add(job, now)
        key = (job.state, job.reason, job.stage)
        before, when, text = self._shown.get(job.id, ((), 0.0, ""))
        if key == before and now - when < _QUIET:
            return
        line = plain_line(job, pace.text(job.unit))
        if line == text:
            return
        self._shown[job.id] = (key, now, line)
        name = f"{job.id[-6:]} {clean(job.label)}: " if self._named else ""
        self._stream.write(f"{time.strftime('%H:%M:%S')} {name}{line}\n")
        self._stream.flush()


def _watch_plain(feed: Feed, job: str, stream: IO[str]) -> JobView:
    plain = _Plain(stream, named=False)
    while True:
        view = feed.next()
        if view is None or view.id != job:
            continue
        if view.state in TERMINAL:
            return view
        plain.show(view)


def _watch_live(feed: Feed, job: str, stream: IO[str]) -> JobView:
    pace = Pace()
    view: JobView | None = None
    with _screen(stream) as live:
        while True:
            fresh = feed.next(_REFRESH)
            if fresh is not None and fresh.id == job:
                view = fresh
                pace.add(view, time.monotonic())
                if view.state in TERMINAL:
                    return view
            if view is not None:
                live.update(picture(view, pace.text(view.unit), time.time()), refresh=True)


def picture(job: JobView, pace: str, now: float) -> Group:
    """The live view: the job, its stages, the bar of the one that runs, the numbers below it."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    head = Text.assemble((clean(job.model), "bold"), " → ", (clean(job.target), "bold cyan"), f"  {job.id[-6:]}")
    at = _STAGES.index(job.stage) if job.stage in _STAGES else -1
    stages = Text()
    for number, stage in enumerate(_STAGES):
        mark, style = ("✓ ", "green") if number < at else ("● ", "bold cyan") if number == at else ("· ", "dim")
        stages.append(f"{mark}{stage}  ", style)
    running = job.state in ("running", "registering")
    row = Table.grid(padding=(0, 1))
    row.add_row(
        Text(f"{job.state} {'' if running else clean(why(job))}".strip(), "cyan" if running else "yellow"),
        ProgressBar(total=job.total if job.total > 0 else None, completed=job.done, width=40, pulse=job.total <= 0)
        if running
        else Text(""),
        Text(percent(job)),
    )
    elapsed = duration(max(0.0, now - job.started)) if job.started else ""
    numbers = [
        f"{elapsed} so far" if elapsed else "",
        pace,
        f"{duration(job.remaining)} left" if job.remaining is not None else "",
        f"{size(job.memory)} memory" if job.memory else "",
        clean(job.message),
    ]
    return Group(head, stages, row, Text(" · ".join(part for part in numbers if part), "dim"))


def _screen(stream: IO[str]) -> Live:
    from rich.console import Console
    from rich.live import Live

    console = Console(file=stream, highlight=False, no_color=not colours(stream))
    return Live(console=console, auto_refresh=False, transient=True)


def _drain(feed: Feed, seconds: float) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        feed.next(left)
