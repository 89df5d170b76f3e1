"""What is kept of ended jobs, and for how long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterate.contract.ids import new_id
from abliterate.contract.recipe import Recipe
from abliterated.jobs.journal import Job, Journal
from abliterated.jobs.ledger import Ledger
from abliterated.jobs.retention import DAY, STAGE_DAYS, clean, expired
from jobs.test_scheduler import job

NOW = 1000 * DAY


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "journal.sqlite3")
    yield opened
    opened.close()


@given(st.lists(st.one_of(st.none(), st.floats(0, 400)), max_size=8), st.floats(0, 365))
def test_none_is_forgotten_early_and_none_that_has_not_ended(ages: list[float | None], keep: float) -> None:
    jobs: list[Job] = []
    for number, age in enumerate(ages):
        one = job(number)
        jobs.append(Job(**{**vars(one), "ended": None if age is None else NOW - age * DAY}))
    forget, strip = expired(jobs, NOW, keep)
    age_of = {one.id: age for one, age in zip(jobs, ages, strict=True)}
    assert not set(forget) & set(strip)
    for job_id, age in age_of.items():
        if age is None or age < keep - 1e-6:
            assert job_id not in forget
        if age is None or age < STAGE_DAYS - 1e-6:
            assert job_id not in strip


async def test_stages_go_after_a_week_and_the_job_after_its_days_with_a_rejected_file(
    ledger: Ledger, tmp_path: Path
) -> None:
    jobs, rejected = tmp_path / "jobs", tmp_path / "rejected"
    rejected.mkdir()
    ids = []
    for ended in (1.0, 10.0, 100.0):
        made, _ = await ledger.do(Journal.add, new_id(), "night", Recipe(model="ollama:m"))
        await ledger.do(Journal.move, made.id, "cancelled")
        ledger.do_blocking(lambda j, i=made.id, e=ended: j._db.execute(  # type: ignore[misc]
            "UPDATE job SET ended = ? WHERE id = ?", (NOW - e * DAY, i)))  # fmt: skip
        (jobs / made.id / "work").mkdir(parents=True)
        (jobs / made.id / "work" / "stage").write_bytes(bytes(1000))
        (jobs / made.id / "recipe.toml").write_text("x")
        ids.append(made.id)
    live, _ = await ledger.do(Journal.add, new_id(), "live", Recipe(model="ollama:m"))
    (rejected / "old.toml").write_text("x")
    forgotten, freed = await clean(ledger, jobs, rejected, NOW, 90)
    assert (forgotten, freed >= 2000) == (1, True)
    assert {path.name for path in jobs.iterdir()} == {ids[0], ids[1]}
    assert [(jobs / one / "work").exists() for one in ids[:2]] == [True, False]
    assert (jobs / ids[1] / "recipe.toml").exists()
    assert {one.id for one in await ledger.do(Journal.jobs)} == {ids[0], ids[1], live.id}
    assert await clean(ledger, jobs, rejected, NOW, 90) == (0, 0)
