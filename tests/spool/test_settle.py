"""When a file counts as complete."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from abliterated.spool.settle import AGAIN, PATIENCE, QUIET, Sighting, concerns, settle


def test_a_good_file_nobody_writes_is_taken_at_once() -> None:
    assert settle(Sighting(10.0, writer_gone=True, good=True), 10.0) == ("accept", 0.0)


def test_a_good_file_whose_writer_is_not_known_waits_a_moment() -> None:
    assert settle(Sighting(10.0, writer_gone=None, good=True), 10.0 + QUIET - 0.01)[0] == "wait"
    assert settle(Sighting(10.0, writer_gone=None, good=True), 10.0 + QUIET)[0] == "accept"


def test_half_a_recipe_may_read_as_a_whole_one_so_a_writer_who_is_there_is_given_time() -> None:
    verdict, again = settle(Sighting(10.0, writer_gone=False, good=True), 10.0 + QUIET)
    assert (verdict, again <= AGAIN) == ("wait", True)
    assert settle(Sighting(10.0, writer_gone=False, good=True), 10.0 + PATIENCE)[0] == "accept"


def test_a_bad_file_is_given_time_even_when_its_writer_is_gone() -> None:
    assert settle(Sighting(10.0, writer_gone=True, good=False), 10.0 + PATIENCE - 0.01)[0] == "wait"
    assert settle(Sighting(10.0, writer_gone=True, good=False), 10.0 + PATIENCE)[0] == "reject"


@given(st.floats(0, 100), st.sampled_from([True, False, None]), st.booleans(), st.floats(0, 100))
def test_whoever_waits_is_looked_at_again_and_decided_in_time(
    since: float, gone: bool | None, good: bool, more: float
) -> None:
    seen = Sighting(since, gone, good)
    verdict, wait = settle(seen, since + more)
    if verdict == "wait":
        assert 0 < wait <= PATIENCE
        assert settle(seen, since + PATIENCE + 1e-6)[0] != "wait"


def test_what_editors_and_copiers_leave_lying_is_not_a_recipe() -> None:
    for name in (".a.toml", "_a.toml", "#a.toml#", "~a.toml", "a.toml~", "a.toml.swp", "a.toml.part", "a.txt", "toml"):
        assert not concerns(name), name
    assert concerns("a.toml")
