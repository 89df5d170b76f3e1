"""When a file counts as complete."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from abliterated.spool.settle import PATIENCE, QUIET, Sighting, concerns, settle


def test_a_good_file_nobody_writes_is_taken_at_once() -> None:
    assert settle(Sighting(10.0, writer_gone=True, good=True), 10.0) == ("accept", 0.0)


def test_a_good_file_that_may_still_grow_waits_a_moment() -> None:
    assert settle(Sighting(10.0, writer_gone=False, good=True), 10.1)[0] == "wait"
    assert settle(Sighting(10.0, writer_gone=False, good=True), 10.0 + QUIET)[0] == "accept"


def test_a_bad_file_is_given_time_even_when_its_writer_is_gone() -> None:
    assert settle(Sighting(10.0, writer_gone=True, good=False), 10.0 + PATIENCE - 0.01)[0] == "wait"
    assert settle(Sighting(10.0, writer_gone=True, good=False), 10.0 + PATIENCE)[0] == "reject"


@given(st.floats(0, 100), st.booleans(), st.booleans(), st.floats(0, 100))
def test_whoever_waits_is_told_until_when_and_then_is_decided(
    since: float, gone: bool, good: bool, more: float
) -> None:
    seen = Sighting(since, gone, good)
    verdict, wait = settle(seen, since + more)
    if verdict == "wait":
        assert wait > 0
        assert settle(seen, since + more + wait + 1e-6)[0] != "wait"


def test_what_editors_and_copiers_leave_lying_is_not_a_recipe() -> None:
    for name in (".a.toml", "_a.toml", "#a.toml#", "~a.toml", "a.toml~", "a.toml.swp", "a.toml.part", "a.txt", "toml"):
        assert not concerns(name), name
    assert concerns("a.toml")
