"""A filesystem that is really full: the journal stays whole, the failure is said, and all goes on with new room."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from abliterate.contract.errors import DiskError
from abliterate.contract.ids import new_id
from abliterate.contract.recipe import Recipe
from abliterated.jobs.journal import Journal
from abliterated.jobs.spare import SIZE, Spare

RECIPE = Recipe(model="ollama:m")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """80 MB of a filesystem of its own."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "none", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no filesystem can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


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
