"""Which jobs run next, on what, and what each of the others is told."""

from __future__ import annotations

import datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterate.contract.recipe import Recipe, Run, Schedule
from abliterated.jobs.journal import Job
from abliterated.jobs.scheduler import FETCHES_AT_ONCE, LOOK_AGAIN, Active, Conditions, Device, decide, in_window

NOON = datetime.datetime(2027, 5, 4, 12, 0).astimezone()
BERLIN = ZoneInfo("Europe/Berlin")
GPUS = (Device("GPU-a", 0), Device("GPU-b", 1))
TAKEN = (Active("other", "cpu"),)


def job(
    seq: int,
    *,
    state: str = "queued",
    label: str = "",
    retry_at: float = 0,
    model: str = "ollama:m",
    device: str = "auto",
    reason: str = "ready",
    **schedule: object,
) -> Job:
    recipe = Recipe(model=model, schedule=Schedule(**schedule), run=Run(device=device))  # type: ignore[arg-type]
    return Job(
        seq=seq,
        id=f"job{seq}",
        label=label or f"label{seq}",
        recipe=recipe,
        digest="",
        model=model,
        target="m-abliterated:latest",
        state=state,  # type: ignore[arg-type]
        reason=reason,  # type: ignore[arg-type]
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


def started(jobs: list[Job], **changes: object) -> list[str]:
    return [start.job for start in decide(jobs, conditions(**changes)).start]


def why(jobs: list[Job], **changes: object) -> dict[str, str]:
    return {waiting.job: waiting.reason for waiting in decide(jobs, conditions(**changes)).waiting}


def test_first_come_first_served() -> None:
    assert started([job(2), job(1), job(3)]) == ["job1"]


def test_a_higher_priority_goes_first_and_the_other_is_told() -> None:
    assert started([job(1), job(2, priority=5)]) == ["job2"]
    assert why([job(1), job(2, priority=5)]) == {"job1": "priority"}


def test_one_job_at_a_time_and_the_next_is_told_why() -> None:
    assert started([job(1)], active=TAKEN) == []
    decision = decide([job(1)], conditions(active=(Active("01abcdefgh", "cpu"),)))
    assert [(w.job, w.reason, w.explanation) for w in decision.waiting] == [
        ("job1", "gpu-busy", "job cdefgh holds the device")
    ]


def test_one_job_a_gpu_and_each_gets_its_own() -> None:
    decision = decide([job(1), job(2), job(3)], conditions(devices=GPUS))
    assert [(start.job, start.device.name) for start in decision.start] == [("job1", "GPU-a"), ("job2", "GPU-b")]
    assert why([job(1), job(2), job(3)], devices=GPUS) == {"job3": "gpu-busy"}


def test_a_named_gpu_is_waited_for_while_others_are_free() -> None:
    busy = (Active("other", "GPU-b"),)
    assert started([job(1, device="cuda:1")], devices=GPUS, active=busy) == []
    assert started([job(1, device="cuda:1"), job(2)], devices=GPUS, active=busy) == ["job2"]
    assert started([job(1, device="cpu")], devices=GPUS, active=(Active("a", "GPU-a"), Active("b", "GPU-b"))) == [
        "job1"
    ]


def test_a_model_is_fetched_while_another_job_holds_the_device() -> None:
    assert started([job(1, model="hf:o/m")], active=TAKEN) == ["job1"]
    fetching = (*TAKEN, *(Active(f"f{n}", "cpu", fetching=True) for n in range(FETCHES_AT_ONCE)))
    assert why([job(1, model="hf:o/m")], active=fetching) == {"job1": "gpu-busy"}


def test_the_device_is_not_kept_idle_for_one_that_fetches() -> None:
    assert started([job(1)], active=(Active("f", "cpu", fetching=True),)) == ["job1"]


@pytest.mark.parametrize(("change", "reason"), [({"paused": True}, "paused"), ({"draining": True}, "drain")])
def test_a_paused_or_drained_queue_starts_nothing(change: dict[str, bool], reason: str) -> None:
    assert started([job(1)], **change) == []
    assert why([job(1)], **change) == {"job1": reason}


def test_a_job_in_backoff_lets_the_next_go_first_and_says_when_to_look_again() -> None:
    decision = decide([job(1, retry_at=1030.0), job(2)], conditions())
    assert [start.job for start in decision.start] == ["job2"]
    assert decision.waiting[0].reason == "backoff"
    assert decision.look_again == 30.0


@pytest.mark.parametrize("reason", ["disk", "vram", "memory", "ollama-down"])
def test_a_job_in_backoff_keeps_the_reason_it_was_given(reason: str) -> None:
    assert why([job(1, retry_at=1030.0, reason=reason)]) == {"job1": reason}


def test_not_before_is_local_time_and_no_wait_is_longer_than_a_look() -> None:
    later = (NOON + datetime.timedelta(hours=1)).replace(tzinfo=None).isoformat()
    decision = decide([job(1, not_before=later)], conditions())
    assert (decision.start, decision.waiting[0].reason, decision.look_again) == ((), "not-before", LOOK_AGAIN)
    earlier = (NOON - datetime.timedelta(hours=1)).replace(tzinfo=None).isoformat()
    assert started([job(1, not_before=earlier)]) == ["job1"]


def test_not_before_with_a_zone_is_that_zone_s_time() -> None:
    utc = datetime.datetime(2027, 5, 4, 12, 0, tzinfo=datetime.UTC)
    assert started([job(1, not_before="2027-05-04T14:30+02:00")], local=utc) == []
    assert started([job(1, not_before="2027-05-04T14:00+02:00")], local=utc) == ["job1"]


def test_a_window_over_midnight_is_open_on_both_sides_of_it() -> None:
    assert in_window("22:00-06:00", datetime.time(23, 30))
    assert in_window("22:00-06:00", datetime.time(5, 59))
    assert not in_window("22:00-06:00", datetime.time(6, 0))


def test_a_window_that_ends_as_it_begins_is_always_open() -> None:
    assert all(in_window("03:00-03:00", datetime.time(hour)) for hour in range(24))


def test_outside_its_window_a_job_waits_and_is_looked_at_again() -> None:
    decision = decide([job(1, window="01:00-07:00")], conditions())
    assert (decision.start, decision.waiting[0].reason) == ((), "window")
    assert decision.look_again is not None


def minutes_open(window: str, first: datetime.datetime, hours: int) -> int:
    """Real minutes of a night in Berlin in which a job with that window would start."""
    count = 0
    for minute in range(hours * 60):
        local = (first + datetime.timedelta(minutes=minute)).astimezone(BERLIN)
        count += bool(started([job(1, window=window)], now=local.timestamp(), local=local))
    return count


@pytest.mark.parametrize(
    ("evening", "minutes"),
    [
        (datetime.datetime(2027, 3, 26, 22, tzinfo=datetime.UTC), 360),
        (datetime.datetime(2027, 3, 27, 22, tzinfo=datetime.UTC), 300),  # the clock goes from 02:00 to 03:00
        (datetime.datetime(2026, 10, 24, 22, tzinfo=datetime.UTC), 420),  # 02:00 comes twice
    ],
)
def test_a_window_is_the_wall_s_also_in_the_nights_when_the_clock_is_changed(
    evening: datetime.datetime, minutes: int
) -> None:
    assert minutes_open("01:00-07:00", evening, 12) == minutes


def test_not_before_in_the_hour_that_does_not_exist_is_the_hour_after_it() -> None:
    before = datetime.datetime(2027, 3, 28, 0, 59, tzinfo=datetime.UTC).astimezone(BERLIN)
    after = datetime.datetime(2027, 3, 28, 1, 0, tzinfo=datetime.UTC).astimezone(BERLIN)
    assert (before.hour, after.hour) == (1, 3)
    assert started([job(1, not_before="2027-03-28T02:30")], local=before) == []
    assert started([job(1, not_before="2027-03-28T02:30")], local=after) == ["job1"]


def test_not_before_set_in_summer_for_winter_is_not_an_hour_off() -> None:
    summer = datetime.datetime(2026, 10, 25, 0, 30, tzinfo=datetime.UTC).astimezone(BERLIN)
    fixed = summer.replace(tzinfo=datetime.timezone(summer.utcoffset() or datetime.timedelta()))
    decision = decide([job(1, not_before="2026-10-25T03:30")], conditions(local=fixed))
    assert decision.look_again is not None
    assert decision.look_again <= LOOK_AGAIN, "asked again often enough to see the clock change"


def test_after_waits_for_the_named_recipe_to_succeed() -> None:
    assert started([job(1, label="first", state="running"), job(2, after=["first"])]) == []
    assert started([job(2, after=["first"])], ended={"first": "failed"}) == []
    assert started([job(2, after=["first"])], ended={"first": "succeeded"}) == ["job2"]


def test_a_dependency_that_failed_or_does_not_exist_is_said() -> None:
    told = decide([job(2, after=["first"])], conditions(ended={"first": "failed"})).waiting[0]
    assert "abliterate retry" in told.explanation
    told = decide([job(2, after=["frist"])], conditions()).waiting[0]
    assert "no job is called frist" in told.explanation


def test_gpu_idle_waits_for_a_quiet_minute_and_for_strangers() -> None:
    decision = decide([job(1, when="gpu-idle")], conditions(idle_seconds=20.0))
    assert (decision.start, decision.look_again) == ((), 40.0)
    assert started([job(1, when="gpu-idle")], idle_seconds=61.0) == ["job1"]
    busy = (Device("GPU-a", 0, used=80.0),)
    assert why([job(1, when="gpu-idle")], devices=busy) == {"job1": "gpu-busy"}
    assert started([job(1)], devices=busy) == ["job1"], "who does not ask for idleness does not wait for it"
    half = (*busy, Device("GPU-b", 1, used=3.0))
    assert [s.device.name for s in decide([job(1, when="gpu-idle")], conditions(devices=half)).start] == ["GPU-b"]


SHAPES = st.fixed_dictionaries(
    {
        "priority": st.integers(-3, 3),
        "retry_at": st.sampled_from([0.0, 500.0, 2000.0]),
        "model": st.sampled_from(["ollama:m", "hf:o/m"]),
        "device": st.sampled_from(["auto", "cpu", "cuda:0", "cuda:1", "cuda:7"]),
        "window": st.sampled_from(["", "", "01:00-07:00", "11:00-13:00"]),
        "when": st.sampled_from(["any", "any", "gpu-idle"]),
    }
)


@given(
    st.lists(SHAPES, max_size=10),
    st.lists(st.tuples(st.sampled_from(["cpu", "GPU-a", "GPU-b"]), st.booleans()), max_size=4),
    st.sampled_from([(Device("cpu"),), GPUS, (Device("GPU-a", 0, 50.0),)]),
    st.booleans(),
    st.sampled_from([0.0, 100.0]),
)
def test_every_queued_job_starts_or_is_told_why_and_no_device_has_two(
    shapes: list[dict[str, object]],
    active: list[tuple[str, bool]],
    devices: tuple[Device, ...],
    paused: bool,
    idle: float,
) -> None:
    jobs = [job(n, **shape) for n, shape in enumerate(shapes)]  # type: ignore[arg-type]
    busy = [Active(f"a{n}", name, fetching) for n, (name, fetching) in enumerate(active)]
    decision = decide(jobs, conditions(active=busy, devices=devices, paused=paused, idle_seconds=idle))
    told = [waiting.job for waiting in decision.waiting] + [start.job for start in decision.start]
    assert sorted(told) == sorted(one.id for one in jobs)
    assert all(waiting.reason and waiting.explanation for waiting in decision.waiting)
    assert not (paused and decision.start)
    by_id = {one.id: one for one in jobs}
    held = [one.device for one in busy if not one.fetching]
    for start in decision.start:
        if by_id[start.job].model == "ollama:m":
            assert start.device.name not in held
            held.append(start.device.name)
        assert by_id[start.job].retry_at <= 1000.0
    # Of those that want the same, the better one starts.
    for waiting in decision.waiting:
        loser = by_id[waiting.job]
        for start in decision.start:
            winner = by_id[start.job]
            if waiting.reason in ("gpu-busy", "priority") and winner.recipe.run == loser.recipe.run:
                same = (winner.model, winner.recipe.schedule.when) == (loser.model, loser.recipe.schedule.when)
                rank = [(-one.recipe.schedule.priority, one.seq) for one in (winner, loser)]
                assert not same or rank[0] < rank[1]
