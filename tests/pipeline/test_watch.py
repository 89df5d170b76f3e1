"""Time, progress and stopping, with a clock of the test's own."""

from __future__ import annotations

import pytest

from abliterate.contract.errors import Cancelled
from abliterate.contract.messages import Progress
from abliterated.pipeline.watch import Watch


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_an_estimate_is_given_only_once_it_is_honest() -> None:
    clock, seen = Clock(), list[Progress]()
    watch = Watch(seen.append, lambda: False, clock)
    with watch.stage("direction"):
        for done in range(101):
            watch.step(done, 100, "prompts", "measuring")
            clock.now += 0.5
    assert seen[2].remaining is None
    assert seen[-10].remaining == pytest.approx((101 - 10) and 9 * 0.5 + 0.0, abs=1.0)
    assert seen[-1].remaining == 0.0
    assert watch.seconds == {"direction": 50.5}
    assert seen[-1].memory > 1_000_000


def test_a_new_piece_of_work_begins_a_new_estimate() -> None:
    clock, seen = Clock(), list[Progress]()
    watch = Watch(seen.append, lambda: False, clock)
    with watch.stage("evaluate"):
        watch.step(1, 2, "answers", "asking one")
        clock.now += 60
        watch.step(1, 2, "answers", "asking another")
    assert seen[-1].remaining is None


def test_progress_is_news_and_not_a_stream() -> None:
    clock, seen = Clock(), list[Progress]()
    watch = Watch(seen.append, lambda: False, clock)
    with watch.stage("edit"):
        for done in range(1000):
            watch.step(done, 1000, "bytes", "editing")
            clock.now += 0.001
    assert len(seen) < 10


def test_a_stage_entered_twice_keeps_both_times_and_stops_when_asked() -> None:
    clock, stop = Clock(), False
    watch = Watch(lambda _: None, lambda: stop, clock)
    for _ in range(2):
        with watch.stage("evaluate"):
            clock.now += 2
    assert watch.seconds == {"evaluate": 4.0}
    stop = True
    with pytest.raises(Cancelled), watch.stage("report"):
        pass
