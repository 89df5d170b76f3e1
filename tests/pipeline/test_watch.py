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
    told = {progress.done: progress.remaining for progress in seen if progress.total}
    assert [done for done, left in told.items() if left is None] == [0, 1, 2, 3, 4]  # less than a twentieth
    for done, left in told.items():
        assert left is None or left == pytest.approx((100 - done) * 0.5, abs=0.5)
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
