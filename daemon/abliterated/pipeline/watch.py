"""A run's clock: which stage it is in, how long each took, what is left, and whether it was asked to stop.

Does not know what the stages do.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final

import psutil

from abliterate.contract.errors import Cancelled
from abliterate.contract.messages import Progress
from abliterate.contract.states import Stage

# Progress is news, not a stream: at most so often, seconds.
EVERY: Final = 0.25
# What is counted over a run.
DECODED: Final = "tokens_decoded_run"
PREFILLED: Final = "tokens_prefilled_run"
# Before a twentieth is done, or a second has gone by, an estimate would be a guess.
HONEST_SHARE: Final = 0.05
HONEST_SECONDS: Final = 1.0


class Watch:
    """Emits progress, keeps each stage's seconds, and raises Cancelled at the next step once the run is to stop."""

    def __init__(
        self,
        emit: Callable[[Progress], None] = lambda _: None,
        cancelled: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.emit, self.cancelled, self.clock = emit, cancelled, clock
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self._stage: Stage = "load"
        self._began = self._last = clock()
        self._work: tuple[str, float] = ("", clock())

    @contextlib.contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Everything inside counts as this stage, which may be entered more than once."""
        self.check()
        self._stage, self._began = stage, self.clock()
        self._last = self._began - EVERY
        self._work = ("", self._began)
        self.step(0, 0, message="")
        try:
            yield
        finally:
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + self.clock() - self._began, 3)

    def step(self, done: float, total: float, unit: str = "", message: str = "") -> None:
        """`done` of `total` of the piece of work that `message` names."""
        self.check()
        now = self.clock()
        if message != self._work[0]:
            self._work = (message, now)
        elif now - self._last < EVERY and done < total:
            return
        self._last = now
        self.emit(
            Progress(
                stage=self._stage,
                done=done,
                total=total,
                unit=unit,
                message=message,
                remaining=self._remaining(done, total, now),
                memory=peak_memory(),
            )
        )

    def count(self, what: str, number: int) -> None:
        """Add to what is counted over the run."""
        self.counts[what] = self.counts.get(what, 0) + number

    def check(self) -> None:
        """Raise Cancelled if the run was asked to stop."""
        if self.cancelled():
            raise Cancelled("the run was asked to stop", remedy="Submit it again to go on where it stopped")

    def _remaining(self, done: float, total: float, now: float) -> float | None:
        spent = now - self._work[1]
        if total <= 0 or done < HONEST_SHARE * total or spent < HONEST_SECONDS:
            return None
        return round(spent / done * (total - done), 1)


def peak_memory() -> int:
    """The most bytes this process ever held resident."""
    try:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    except ImportError:
        return int(psutil.Process().memory_info().rss)
