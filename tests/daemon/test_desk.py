"""From a file to a job: exactly one, whatever happens in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from abliterate.contract.errors import DiskError, RecipeError
from abliterate.contract.ids import new_id
from abliterate.contract.messages import EngineView, JobView, Result, Submit, Task
from abliterated.desk import QueueDesk
from abliterated.jobs.dispatcher import Dispatcher
from abliterated.jobs.journal import Job, Journal
from abliterated.jobs.ledger import Ledger
from abliterated.spool.tray import Tray

GOOD = b'model = "ollama:m"\n'


async def no_task(job: Job, folder: Path) -> Task:
    raise AssertionError("nothing runs here")


async def no_product(job: Job, result: Result, out: Path) -> list[str]:
    raise AssertionError("nothing runs here")


async def no_engine() -> EngineView:
    return EngineView(kind="ollama", url="http://127.0.0.1:9")


class Office:
    """A desk and a tray on a real journal; no dispatcher runs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.jobs = root / "jobs"
        self.incoming = root / "incoming"
        for folder in (self.jobs, self.incoming):
            folder.mkdir(exist_ok=True)
        self.ledger = Ledger(root / "journal.sqlite3")
        self.told: list[str] = []
        self.dispatcher = Dispatcher(
            self.ledger, self.jobs, prepare=no_task, register=no_product, publish=lambda view, number: None
        )
        self.desk = QueueDesk(
            self.ledger,
            self.dispatcher,
            self.jobs,
            roots=[],
            engine=no_engine,
            proxy_address="",
            proxy_numbers=dict,
            tell=lambda job: self.told.append(job.id),
        )
        self.tray = Tray(self.incoming, root / "rejected", self.desk.check, self.desk.accept, self.desk.gone)

    def drop(self, name: str = "night.toml") -> None:
        path = self.incoming / name
        path.write_bytes(GOOD)
        path.chmod(0o640)

    async def scan(self) -> None:
        """Once; and again where nobody can tell whether a file is still being written, so that it is given a moment."""
        async with asyncio.timeout(60):
            while (again := await asyncio.to_thread(self.tray.scan)) is not None:
                await asyncio.sleep(again)

    def scan_at_last(self) -> None:
        for now in (0.0, 60.0):
            self.tray.scan(lambda now=now: now)  # type: ignore[misc]

    async def views(self) -> list[JobView]:
        return await self.desk.jobs()


@pytest.fixture
async def office(tmp_path: Path) -> AsyncIterator[Office]:
    made = Office(tmp_path)
    yield made
    made.ledger.close()


async def test_a_file_becomes_one_job_with_a_copy_of_its_bytes(office: Office) -> None:
    office.drop()
    await office.scan()
    await office.scan()
    (view,) = await office.views()
    assert (office.jobs / view.id / "recipe.toml").read_bytes() == GOOD
    assert list(office.incoming.iterdir()) == []
    assert office.told == [view.id]


async def test_a_death_after_the_commit_makes_no_second_job(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    office.drop()

    def die(folder: int, entry: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("abliterated.spool.tray.remove_entry", die)
        with pytest.raises(KeyboardInterrupt):
            office.scan_at_last()
    assert len(await office.views()) == 1
    assert len(list(office.incoming.iterdir())) == 1
    await office.scan()
    assert len(await office.views()) == 1
    assert list(office.incoming.iterdir()) == []


async def test_a_death_before_the_commit_loses_nothing_and_leaves_nothing(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    office.drop()

    def die(*arguments: object, **keywords: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add_all", die)
        with pytest.raises(KeyboardInterrupt):
            office.scan_at_last()
    assert len(list(office.jobs.iterdir())) == 1
    await office.desk.sweep()
    assert list(office.jobs.iterdir()) == []
    await office.scan()
    (view,) = await office.views()
    assert [path.name for path in office.jobs.iterdir()] == [view.id]


async def test_the_same_bytes_dropped_again_are_a_new_wish(office: Office) -> None:
    for _ in range(3):
        office.drop()
        await office.scan()
    assert len(await office.views()) == 3
    assert await office.ledger.do(Journal.claimed, "") is None


async def test_a_file_under_a_known_jobs_id_does_not_touch_that_job(office: Office) -> None:
    first = await office.desk.submit(Submit(recipe=GOOD.decode(), id=new_id()), "test")
    path = office.incoming / f"{first.id}.other.toml"
    path.write_bytes(b'model = "ollama:other"\n')
    path.chmod(0o640)
    await office.scan()
    assert (office.jobs / first.id / "recipe.toml").read_bytes() == GOOD
    (rejected,) = (office.root / "rejected").glob("*.toml")
    assert rejected.read_bytes() == b'model = "ollama:other"\n'
    office.drop(f"{first.id}.again.toml")
    await office.scan()
    assert len(await office.views()) == 1
    assert list(office.incoming.iterdir()) == []


async def test_a_submission_sent_twice_is_one_job(office: Office) -> None:
    wanted = Submit(recipe=GOOD.decode(), id=new_id(), label="night")
    first = await office.desk.submit(wanted, "test")
    second = await office.desk.submit(wanted, "test")
    assert (first.existing, second.existing, first.id) == (False, True, second.id)
    assert first.target == "m-abliterated:latest"
    assert len(await office.views()) == 1


async def test_a_submission_keeps_to_what_a_spooled_recipe_may(office: Office) -> None:
    with pytest.raises(RecipeError, match="no job id"):
        await office.desk.submit(Submit(recipe=GOOD.decode(), id="../../etc"), "test")
    with pytest.raises(RecipeError, match="outside"):
        await office.desk.submit(Submit(recipe='model = "/etc/passwd"'), "test")
    assert await office.views() == []


async def test_a_submission_whose_copy_can_not_be_kept_is_no_job(office: Office) -> None:
    office.jobs.rmdir()
    office.jobs.write_text("somebody's file")
    with pytest.raises(DiskError) as caught:
        await office.desk.submit(Submit(recipe=GOOD.decode()), "test")
    assert "can't be written (Not a directory)" in caught.value.message
    assert "Free some space" in caught.value.remedy
    assert await office.views() == [] and office.told == []


async def test_sweeping_touches_nothing_that_is_not_a_jobs(office: Office) -> None:
    (office.jobs / "notes").mkdir()
    (office.jobs / "file").write_text("x")
    await office.desk.submit(Submit(recipe=GOOD.decode()), "test")
    await office.desk.sweep()
    assert len(list(office.jobs.iterdir())) == 3
