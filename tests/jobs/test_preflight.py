"""Room for a job: on each filesystem by itself, less what others were promised."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterate.contract.messages import Task
from abliterate.contract.recipe import Export, Recipe
from abliterated.jobs.preflight import MARGIN, Need, Room, identity, lacking, needs, rooms

GB = 10**9
ROOMS = {1: Room(10 * GB, "/var"), 2: Room(3 * GB, "/srv")}


def task(root: Path, size: int, export: Export | None = None) -> Task:
    source, work, out = root / "m.gguf", root / "work", root / "out"
    for folder in (work, out):
        folder.mkdir(exist_ok=True)
    source.touch()
    os.truncate(source, size)
    recipe = Recipe(model="ollama:m", export=export or Export())
    return Task(recipe=recipe, base="m", source=str(source), work=str(work), output=str(out))


def test_each_filesystem_is_asked_for_what_lands_on_it() -> None:
    wanted = [Need(1, 8 * GB, "the product"), Need(2, 2 * GB, "the engine's copy")]
    assert lacking(wanted, [], ROOMS) == ""
    assert lacking([wanted[0], Need(2, 4 * GB, "the engine's copy")], [], ROOMS) == (
        "/srv: the engine's copy need 4.0 GB, 3.0 GB are free"
    )


def test_two_needs_on_one_filesystem_add_up() -> None:
    told = lacking([Need(1, 6 * GB, "the product"), Need(1, 6 * GB, "the engine's copy")], [], ROOMS)
    assert told.startswith("/var: the product and the engine's copy need 12.0 GB")


def test_what_others_were_promised_is_not_free() -> None:
    told = lacking([Need(1, 6 * GB, "the product")], [Need(1, 5 * GB, "the product")], ROOMS)
    assert told.endswith("10.0 GB are free, 5.0 GB of it promised to other jobs")
    assert lacking([Need(1, 6 * GB, "the product")], [Need(2, 5 * GB, "the product")], ROOMS) == ""


@given(st.lists(st.integers(0, 20 * GB), max_size=4), st.lists(st.integers(0, 20 * GB), max_size=4))
def test_nothing_is_said_exactly_where_all_fits(mine: list[int], theirs: list[int]) -> None:
    told = lacking([Need(1, one, "x") for one in mine], [Need(1, one, "y") for one in theirs], ROOMS)
    assert (told == "") == (sum(mine) + sum(theirs) <= 10 * GB or not mine)


def test_a_product_needs_its_base_s_size_and_what_is_written_already_counts(tmp_path: Path) -> None:
    made = task(tmp_path, 1000)
    (need,) = needs(made)
    assert (need.filesystem, need.bytes) == (tmp_path.stat().st_dev, int(1000 * MARGIN))
    (tmp_path / "work" / "stage").write_bytes(bytes(600))
    assert needs(made)[0].bytes == int(1000 * MARGIN) - 600
    assert needs(task(tmp_path, 1000, Export(format="direction"))) == ()


def test_the_engine_s_copy_is_asked_for_where_it_can_be_no_link(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    assert len(needs(task(tmp_path, 1000), tmp_path / "store")) == 1, "one filesystem: a link"
    if not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one filesystem here")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        found = needs(task(tmp_path, 1000), Path(other))
        assert [(need.filesystem, need.bytes) for need in found[1:]] == [(Path(other).stat().st_dev, 1000)]
        assert set(rooms([tmp_path, Path(other)])) == {tmp_path.stat().st_dev, Path(other).stat().st_dev}


def test_the_same_bytes_are_known_again_and_others_are_not(tmp_path: Path) -> None:
    first = identity(task(tmp_path, 1000))
    assert identity(task(tmp_path, 1000)) != "", "a file's size and time stand for its bytes"
    os.utime(tmp_path / "m.gguf", ns=(1, 1))
    assert identity(task(tmp_path, 1000)) != first
