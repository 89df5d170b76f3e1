"""The journal keeps what it was told, refuses illegal moves, and opens what it wrote."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abliterate.contract.errors import NotFound
from abliterate.contract.ids import new_id
from abliterate.contract.messages import Failure, Result
from abliterate.contract.recipe import Recipe, Schedule
from abliterate.contract.states import STATES, TERMINAL, TRANSITIONS, IllegalTransition
from abliterated.jobs.journal import Journal, JournalError
from abliterated.jobs.schema import MIGRATIONS

RECIPE = Recipe(model="ollama:qwen3:8b")


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path / "journal.sqlite3")
    yield opened
    opened.close()


def test_a_job_is_the_same_after_reopening(tmp_path: Path) -> None:
    first = Journal(tmp_path / "j")
    job, new = first.add(new_id(), "night", RECIPE)
    assert new
    result = Result(product="x.gguf", format="gguf", metrics={"kl": 0.1})
    first.move(job.id, "starting", started=3.0)
    first.move(job.id, "running", worker="12:3.5")
    kept, _ = first.move(job.id, "registering", result=result)
    first.close()
    again = Journal(tmp_path / "j")
    assert again.get(job.id) == kept
    assert kept.result == result
    assert kept.target == "qwen3-abliterated:8b"
    again.close()


def test_what_was_answered_is_on_the_disk(tmp_path: Path) -> None:
    """No test cuts the power under SQLite itself: that it syncs each commit is a setting, and it is set."""
    journal = Journal(tmp_path / "j.db")
    set_to = {name: journal._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")}
    journal.close()
    assert set_to == {"journal_mode": "wal", "synchronous": 2}


def test_a_known_id_adds_nothing(journal: Journal) -> None:
    job_id = new_id()
    journal.add(job_id, "a", RECIPE)
    _, new = journal.add(job_id, "b", RECIPE)
    assert not new
    assert [job.label for job in journal.jobs()] == ["a"]


def test_a_recipe_that_asks_to_be_held_is(journal: Journal) -> None:
    job, _ = journal.add(new_id(), "a", Recipe(model="ollama:m", schedule=Schedule(hold=True)))
    assert (job.state, job.reason) == ("held", "user")


def test_every_transition_is_a_row_with_its_actor(journal: Journal) -> None:
    job, _ = journal.add(new_id(), "a", RECIPE, actor="uid 7")
    _, number = journal.move(job.id, "cancelled", actor="uid 8")
    assert journal.last_transition() == number
    assert journal.transitions_after(0) == [(number - 1, job.id), (number, job.id)]


def test_a_failure_is_kept_with_its_remedy(journal: Journal) -> None:
    job, _ = journal.add(new_id(), "a", RECIPE)
    failure = Failure(failure="model", message="no", remedy="yes")
    ended, _ = journal.move(job.id, "failed", failure=failure)
    assert ended.failure == failure
    assert ended.ended is not None


def test_a_job_is_found_by_the_end_of_its_id_and_never_by_too_little(journal: Journal) -> None:
    job, _ = journal.add(new_id(), "a", RECIPE)
    assert journal.match(job.id[-6:]).id == job.id
    assert journal.match(job.id).id == job.id
    assert journal.match(job.id[-6:-1]).id == job.id, "the first letters of the ending that `status` shows"
    for part in ("", job.id[-2:], "%%%%", "zzzzzzzz"):
        with pytest.raises(NotFound):
            journal.match(part)
    journal.add(new_id(), "b", RECIPE)
    with pytest.raises(NotFound, match="several"):
        journal.match(job.id[:4])


def test_a_claimed_file_is_known_until_it_is_gone(journal: Journal) -> None:
    job, _ = journal.add(new_id(), "a", RECIPE, claim="1:2:3:x")
    assert journal.claimed("1:2:3:x") == job.id
    journal.file_gone("1:2:3:x")
    assert journal.claimed("1:2:3:x") is None


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_walk_leaves_the_table(journal: Journal, data: st.DataObject) -> None:
    job, _ = journal.add(new_id(), "walk", RECIPE)
    for _ in range(8):
        wanted = data.draw(st.sampled_from(STATES))
        if wanted in TRANSITIONS[job.state]:
            job, _ = journal.move(job.id, wanted)
            assert (job.ended is not None) == (wanted in TERMINAL)
        else:
            with pytest.raises(IllegalTransition):
                journal.move(job.id, wanted)
            assert journal.get(job.id) == job


def test_a_newer_journal_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "j"
    Journal(path).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version={len(MIGRATIONS) + 1}")
    db.close()
    before = path.read_bytes()
    with pytest.raises(JournalError, match="newer version"):
        Journal(path)
    assert path.read_bytes() == before


def at_version(path: Path, number: int) -> None:
    """A journal as an older version left it, with a job."""
    db = sqlite3.connect(path)
    for script in MIGRATIONS[:number]:
        db.executescript(script)
    db.execute(f"PRAGMA user_version={number}")
    columns = "id, label, recipe, digest, model, target, state, submitted"
    recipe = msgspec.json.encode(RECIPE).decode()
    db.execute(
        f"INSERT INTO job ({columns}) VALUES ('old', 'night', ?, 'd', 'm', 't:latest', 'queued', 1.0)", (recipe,)
    )
    db.execute(
        "INSERT INTO transition (job, old, new, reason, wall, boottime, boot, actor)"
        " VALUES ('old', '', 'queued', '', 1, 1, 'b', 'spool')"
    )
    db.commit()
    db.close()


@pytest.mark.parametrize("number", range(1, len(MIGRATIONS)))
def test_an_older_journal_is_brought_here_and_its_jobs_go_on(tmp_path: Path, number: int) -> None:
    at_version(tmp_path / "j", number)
    journal = Journal(tmp_path / "j")
    assert journal._db.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS)
    assert (journal.get("old").state, journal.get("old").recipe) == ("queued", RECIPE)
    journal.move("old", "starting")
    journal.note("old", base="sha256:x")
    assert [new for _, new, *_ in journal.history("old")] == ["queued", "starting"]
    fresh = Journal(tmp_path / "fresh")
    tables = "SELECT type, name, tbl_name FROM sqlite_master WHERE name NOT LIKE 'sqlite%' ORDER BY name"
    assert journal._db.execute(tables).fetchall() == fresh._db.execute(tables).fetchall()
    assert journal._db.execute("PRAGMA table_info(job)").fetchall() == (
        fresh._db.execute("PRAGMA table_info(job)").fetchall()
    )
    journal.close()
    fresh.close()


def test_a_step_that_fails_leaves_the_journal_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_version(tmp_path / "j", len(MIGRATIONS))
    monkeypatch.setattr("abliterated.jobs.schema.MIGRATIONS", (*MIGRATIONS, "CREATE TABLE new (x); SELECT * FROM no;"))
    with pytest.raises(JournalError):
        Journal(tmp_path / "j")
    monkeypatch.undo()
    journal = Journal(tmp_path / "j")
    assert journal.get("old").state == "queued"
    assert journal._db.execute("SELECT name FROM sqlite_master WHERE name = 'new'").fetchall() == []
    journal.close()


def test_a_file_that_is_no_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(b"not a database, but long enough to be looked at" * 40)
    with pytest.raises(JournalError, match="can't be opened"):
        Journal(path)


def test_an_ended_job_can_be_removed_and_a_live_one_not(journal: Journal) -> None:
    job, _ = journal.add(new_id(), "a", RECIPE)
    journal.remove([job.id])
    assert journal.find(job.id) is not None
    journal.move(job.id, "cancelled")
    journal.remove([job.id])
    assert journal.find(job.id) is None
