"""Which job runs next, and what each of the others is told."""

from __future__ import annotations

import datetime

from hypothesis import given
from hypothesis import strategies as st

from abliterate.contract.recipe import Recipe, Schedule
from abliterated.jobs.journal import Job
from abliterated.jobs.scheduler import Conditions, decide, in_window

NOON = datetime.datetime(2027, 5, 4, 12, 0).astimezone()


def job(seq: int, *, state: str = "queued", label: str = "", retry_at: float = 0, **schedule: object) -> Job:
    recipe = Recipe(model="ollama:m", schedule=Schedule(**schedule))  # type: ignore[arg-type]
    return Job(
        seq=seq,
        id=f"job{seq}",
        label=label or f"label{seq}",
        recipe=recipe,
        digest="",
        model="ollama:m",
        target="m-abliterated:latest",
        state=state,  # type: ignore[arg-type]
        reason="ready",
        explanation="",
        stage="",
        attempts=0,
        crashes=0,
        retry_at=retry_at,
        submitted=0,
        started=None,
        ended=None,
        failure=None,
        result=None,
        worker="",
    )


def conditions(**changes: object) -> Conditions:
    return Conditions(**({"now": 1000.0, "local": NOON} | changes))  # type: ignore[arg-type]


def test_first_come_first_served() -> None:
    assert decide([job(2), job(1), job(3)], conditions()).start == "job1"


def test_a_higher_priority_goes_first() -> None:
    assert decide([job(1), job(2, priority=5)], conditions()).start == "job2"


def test_one_job_at_a_time_and_the_next_is_told_why() -> None:
    decision = decide([job(1)], conditions(slot_taken=True))
    assert decision.start is None
    assert [(w.job, w.reason) for w in decision.waiting] == [("job1", "gpu-busy")]


def test_a_paused_queue_starts_nothing() -> None:
    decision = decide([job(1)], conditions(paused=True))
    assert (decision.start, decision.waiting[0].reason) == (None, "paused")


def test_a_job_in_backoff_lets_the_next_go_first_and_says_when_to_look_again() -> None:
    decision = decide([job(1, retry_at=1030.0), job(2)], conditions())
    assert decision.start == "job2"
    assert decision.waiting[0].reason == "backoff"
    assert decision.look_again == 30.0


def test_not_before_is_local_time() -> None:
    later = (NOON + datetime.timedelta(hours=1)).replace(tzinfo=None).isoformat()
    decision = decide([job(1, not_before=later)], conditions())
    assert (decision.start, decision.waiting[0].reason, decision.look_again) == (None, "not-before", 3600.0)
    earlier = (NOON - datetime.timedelta(hours=1)).replace(tzinfo=None).isoformat()
    assert decide([job(1, not_before=earlier)], conditions()).start == "job1"


def test_a_window_over_midnight_is_open_on_both_sides_of_it() -> None:
    assert in_window("22:00-06:00", datetime.time(23, 30))
    assert in_window("22:00-06:00", datetime.time(5, 59))
    assert not in_window("22:00-06:00", datetime.time(6, 0))


def test_outside_its_window_a_job_waits_and_is_looked_at_again() -> None:
    decision = decide([job(1, window="01:00-07:00")], conditions())
    assert (decision.start, decision.waiting[0].reason) == (None, "window")
    assert decision.look_again is not None


def test_after_waits_for_the_named_recipe_to_succeed() -> None:
    waiting = [job(1, label="first", state="running"), job(2, after=["first"])]
    assert decide(waiting, conditions(slot_taken=False)).start is None
    assert decide([job(2, after=["first"])], conditions(ended={"first": "failed"})).start is None
    assert decide([job(2, after=["first"])], conditions(ended={"first": "succeeded"})).start == "job2"


def test_gpu_idle_waits_for_a_quiet_minute() -> None:
    decision = decide([job(1, when="gpu-idle")], conditions(idle_seconds=20.0))
    assert (decision.start, decision.look_again) == (None, 40.0)
    assert decide([job(1, when="gpu-idle")], conditions(idle_seconds=61.0)).start == "job1"


@given(st.lists(st.tuples(st.integers(-3, 3), st.sampled_from([0.0, 500.0, 2000.0])), max_size=8), st.booleans())
def test_every_queued_job_either_starts_or_is_told_why(shapes: list[tuple[int, float]], busy: bool) -> None:
    jobs = [job(n, priority=p, retry_at=r) for n, (p, r) in enumerate(shapes)]
    decision = decide(jobs, conditions(slot_taken=busy))
    told = {waiting.job for waiting in decision.waiting} | ({decision.start} if decision.start else set())
    assert told == {one.id for one in jobs}
    ready = [one for one in jobs if one.retry_at <= 1000.0]
    assert (decision.start is not None) == (bool(ready) and not busy)
    if decision.start:
        best = min(ready, key=lambda one: (-one.recipe.schedule.priority, one.seq))
        assert decision.start == best.id
