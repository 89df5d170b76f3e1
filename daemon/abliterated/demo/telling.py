"""How the demo tells its story: bars on a terminal, plain lines elsewhere, the table of figures at the end.

Commentary goes to stderr, the table to stdout. Does not know the story.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from abliterate.contract.messages import JobView
from abliterated.demo.asking import Tally


class Teller:
    """Speaks to people."""

    def __init__(self, quiet_table: bool = False) -> None:
        self._quiet_table = quiet_table
        self._err = Console(stderr=True, highlight=False)
        self._out = Console(file=sys.stdout, highlight=False)

    def say(self, text: str) -> None:
        self._err.print(f"  {text}", markup=False)

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        start = time.monotonic()
        if self._err.is_terminal:
            with self._err.status(text):
                yield
        else:
            yield
        self._err.print(f"✓ {text}  ({time.monotonic() - start:.1f} s)", markup=False)

    @contextmanager
    def bar(self, text: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar of `total` steps; the caller tells how many are done."""
        start = time.monotonic()
        with self._drawn() as drawn:
            task = drawn.add_task(text, total=total)
            yield lambda done: drawn.update(task, completed=done)
        self._err.print(f"✓ {text}: {total} questions  ({time.monotonic() - start:.1f} s)", markup=False)

    @contextmanager
    def stages(self) -> Iterator[Callable[[JobView], None]]:
        """A bar a stage of the job."""
        seen: dict[str, TaskID] = {}
        with self._drawn() as drawn:

            def draw(job: JobView) -> None:
                stage = job.stage
                if not stage:
                    return
                if stage not in seen:
                    if not self._err.is_terminal:
                        self._err.print(f"  job: {stage}", markup=False)
                    for earlier in seen.values():
                        total = drawn.tasks[earlier].total or 1
                        drawn.update(earlier, total=total, completed=total)
                    seen[stage] = drawn.add_task(f"job: {stage}", total=job.total or None)
                text = f"job: {stage} {job.message}".strip()
                drawn.update(seen[stage], description=text[:44], completed=job.done, total=job.total or None)

            yield draw
            for task in drawn.tasks:
                drawn.update(task.id, total=task.total or 1, completed=task.total or 1)

    def table(self, before: Tally, after: Tally, job: JobView, seconds: dict[str, float]) -> None:
        """The figures."""
        if self._quiet_table:
            return
        made = job.result
        assert made is not None
        table = Table(
            title=f"{job.model.removeprefix('ollama:')} → {job.target}", show_header=True, title_justify="left"
        )
        table.add_column("")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        table.add_row("refused, of the refused class", f"{before.refusal:.1%}", f"{after.refusal:.1%}")
        table.add_row("exact, of the answered class", f"{before.harmless_exact:.1%}", f"{after.harmless_exact:.1%}")
        table.add_row("exact, of the refused class", f"{before.harmful_exact:.1%}", f"{after.harmful_exact:.1%}")
        table.add_section()
        table.add_row("writers edited", "", f"{made.coverage:.0%}")
        table.add_row("direction left in them", "", f"{made.residual:.2%}")
        table.add_row("peak memory of the worker", "", f"{made.peak_memory / 2**20:.0f} MB")
        table.add_row("bytes written", "", f"{made.bytes_written / 2**20:.1f} MB")
        table.add_section()
        for step, value in seconds.items():
            table.add_row(f"seconds: {step}", "", f"{value:.1f}")
        for stage, value in made.seconds.items():
            table.add_row(f"seconds in the job: {stage}", "", f"{value:.1f}")
        self._out.print(table)
        for kind in ("refused", "answered"):
            if kind in before.example and kind in after.example:
                question, old = before.example[kind]
                self._out.print(
                    f"  {question!r}\n    before: {old!r}\n    after:  {after.example[kind][1]!r}", markup=False
                )

    def _drawn(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._err,
            transient=not self._err.is_terminal,
            disable=not self._err.is_terminal,
        )
