"""A filesystem that is really full: the journal stays whole, the failure is said, and all goes on with new room."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from abliterate.contract.errors import DiskError
from abliterate.contract.ids import new_id
from abliterate.contract.recipe import Recipe
from abliterated.jobs.journal import Journal
from abliterated.jobs.spare import SIZE, Spare
from e2e.daemons import House
from faults.full import leave
from faults.full import small as mounted
from nightly.life import get, some_engine

RECIPE = Recipe(model="ollama:m")


@pytest.fixture
def small() -> Iterator[Path]:
    """80 MB of a filesystem of its own."""
    try:
        with mounted() as place:
            yield place
    except PermissionError as error:
        pytest.skip(str(error))


def fill(place: Path) -> Path:
    ballast = place / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1024**2, 4096):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return ballast


def test_on_a_full_disk_the_spare_file_lets_the_journal_say_so(small: Path) -> None:
    journal = Journal(small / "journal.sqlite3")
    spare = small / "reserve.bin"
    assert spare.stat().st_size == SIZE
    job, _ = journal.add(new_id(), "night", RECIPE)
    ballast = fill(small)
    for state in ("starting", "running"):
        journal.move(job.id, state, explanation="x" * 200_000)
    journal.move(job.id, "queued", reason="disk", explanation="no space left")
    assert not spare.exists(), "its room was used"
    assert journal.get(job.id).reason == "disk"
    with pytest.raises(DiskError) as caught:
        for _ in range(200):
            journal.note(job.id, explanation=os.urandom(100_000).hex())
    assert caught.value.remedy
    assert journal.get(job.id).state == "queued"
    assert journal._db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    ballast.unlink()
    journal.move(job.id, "starting")
    journal.refill()
    assert spare.stat().st_size == SIZE
    journal.close()
    again = Journal(small / "journal.sqlite3")
    assert again.get(job.id).state == "starting"
    again.close()


def test_no_room_is_taken_from_a_disk_that_is_nearly_full(small: Path) -> None:
    spare = Spare(small / "reserve.bin")
    with (small / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 60 * 1024**2)
    spare.fill()
    assert not (small / "reserve.bin").exists()
    assert not spare.give()


def test_however_little_room_is_left_nothing_is_lost_doubled_or_wrong(small: Path) -> None:
    """`make nightly` leaves every number of pages."""
    told = subprocess.run(
        [sys.executable, "-m", "faults.full", "--step", "65536"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        capture_output=True,
        text=True,
        timeout=500,
    )
    figures = json.loads(told.stdout)
    assert (figures["lost"], figures["doubled"], figures["wrong"]) == (0, 0, 0), figures["examples"]
    assert figures["full"] >= 4, "there was room all the time"


def test_while_the_disk_is_full_the_proxy_answers_and_later_the_queue_goes_on(small: Path, tmp_path: Path) -> None:
    (tmp_path / "state").symlink_to(small)
    house = House(tmp_path)
    with some_engine() as port:
        house.upstream = port
        house.configure("ollama")
        house.serve()
        try:
            ballast = leave(small, 4096)  # for the recipe itself; not for its copy
            job_id = house.drop(b'model = "ollama:base"\n', "night")
            log = tmp_path / "daemon.log"
            house.until(lambda: "could not be taken" in log.read_text(), "a word about the full disk")
            assert [get(house, "/api/version")[0] for _ in range(50)] == [200] * 50
            assert house.control.status().jobs == []
            assert house.process is not None
            assert house.process.poll() is None
            ballast.unlink()
            house.until(lambda: house.control.job(job_id).id == job_id, "the job")
        finally:
            house.stop()
