"""The nightly proofs at sizes that fit into every run. Where the bar is a time, a busy machine is given more of it."""

from __future__ import annotations

import pytest

from nightly import life, recipes, spool
from nightly.__main__ import PAGE, PROOFS, known, page
from strangers import crowding


def test_every_proof_was_made_at_its_full_size_and_the_page_says_what_was_found() -> None:
    found = known()
    assert {proof.name for proof in PROOFS} == set(found)
    assert [proof.name for proof in PROOFS if not proof.holds(found[proof.name])] == []
    assert PAGE.read_text() == page(found), "PYTHONPATH=tests python -m nightly --page writes it"


def test_every_file_of_a_burst_becomes_one_job() -> None:
    told = spool.burst(300)
    assert (told["files"], told["lost"], told["doubled"]) == (300, 0, 0)


def test_no_slow_writer_s_recipe_is_taken_half() -> None:
    told = spool.slow_writers(25, seed=7)
    assert (told["taken"], told["truncated"], told["rejected"]) == (25, 0, 0)


def test_any_text_gets_its_verdict_in_time() -> None:
    told = recipes.fuzz(1500, seed=7)
    assert told["uncaught"] == 0
    assert told["good"] > 100, "a fuzz that is always refused shows little"
    assert told["slowest_ms"] <= 200
    assert told["grown_mb"] <= 64


def test_no_lock_has_two_holders() -> None:
    assert life.lock_races(processes=3, rounds=8)["two_holders"] == 0


@pytest.mark.e2e
def test_a_second_daemon_names_the_first_and_goes() -> None:
    told = life.second_daemon(times=1)
    assert (told["code"], told["names_the_holder"]) == (75, True)
    assert told["seconds"] <= 10 * crowding()


@pytest.mark.e2e
def test_a_long_past_does_not_slow_the_start() -> None:
    told = life.start_with_a_past(jobs=1000, times=2)
    assert told["past_seconds"] <= told["empty_seconds"] + 2 * crowding()


@pytest.mark.e2e
def test_a_daemon_stays_small() -> None:
    told = life.memory(jobs=2, requests=400)
    assert told["idle_mb"] <= 60
    assert told["after_mb"] <= 80
    assert told["requests"] == 400
