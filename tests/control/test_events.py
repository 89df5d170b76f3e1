"""Events: nobody is lost but a slow listener's progress."""

from __future__ import annotations

import re

from abliterate.contract.messages import JobView
from abliterated.control import metrics
from abliterated.control.events import BACKLOG, Events, frame
from abliterated.proxy.marks import Tally


def view(job: str = "a", done: float = 0) -> JobView:
    return JobView(id=job, label="l", model="m", target="t", state="running", done=done)


async def test_of_progress_only_the_newest_waits_and_transitions_all_do() -> None:
    events = Events()
    listener = events.listen()
    for done in range(5):
        events.publish(view(done=done), 0)
    events.publish(view("b"), 7)
    events.publish(view("b"), 8)
    assert [(number, one.id, one.done) for number, one in await listener.take()] == [
        (0, "a", 4.0),
        (7, "b", 0.0),
        (8, "b", 0.0),
    ]


async def test_a_listener_that_never_reads_is_dropped_and_costs_a_bounded_amount() -> None:
    events = Events()
    listener = events.listen()
    for number in range(1, BACKLOG + 10):
        events.publish(view(str(number)), number)
    assert listener.lost
    assert len(await listener.take()) == BACKLOG
    events.leave(listener)
    events.publish(view(), 1)


def test_a_frame_is_what_an_event_source_reads() -> None:
    assert frame(7, view()).startswith(b'id: 7\nevent: job\ndata: {"id":"a"')
    assert frame(0, view()).startswith(b"event: job\n")
    assert frame(7, view()).endswith(b"\n\n")


def test_metrics_count_every_state() -> None:
    page = metrics.text(states=["queued", "queued", "failed"], uptime=1.5, resident=10, proxy={"requests": 3.0})
    assert 'abliterated_jobs{state="queued"} 2' in page
    assert 'abliterated_jobs{state="held"} 0' in page
    assert "abliterated_proxy_all_requests_total 3" in page


def test_a_counter_is_named_as_scrapers_expect_and_no_two_families_are_one_to_them() -> None:
    page = metrics.text(states=[], uptime=1.5, resident=10, proxy=dict.fromkeys(metrics.OF_THE_PROXY, 1.0))
    kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)$", page + Tally().text(), re.M))
    assert "untyped" not in kinds.values()
    for name, kind in kinds.items():
        assert name.endswith("_total") == (kind == "counter"), name
    assert len({name.removesuffix("_total") for name in kinds}) == len(kinds)
