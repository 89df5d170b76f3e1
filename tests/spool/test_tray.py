"""What happens to a file in the in-tray: good ones, bad ones, hostile ones."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from abliterate.contract.errors import DiskError, RecipeError
from abliterate.contract.ids import new_id
from abliterate.contract.recipe import Recipe
from abliterated.spool.claim import folder_descriptor, known_owners, read_entry
from abliterated.spool.tray import Accepted, Tray, identity, printable

GOOD = b'model = "ollama:m"\n'


class Box:
    """A tray on real folders, with a clock of its own."""

    def __init__(self, root: Path) -> None:
        self.now = 100.0
        self.taken: list[Accepted] = []
        self.gone: list[str] = []
        self.fail: Exception | None = None
        self.incoming = root / "incoming"
        self.rejected = root / "rejected"
        self.incoming.mkdir()
        self.tray = Tray(self.incoming, self.rejected, lambda recipe: None, self._take, self.gone.append)

    def _take(self, accepted: Accepted) -> None:
        if self.fail:
            raise self.fail
        self.taken.append(accepted)

    def scan(self, after: float = 0.0) -> float | None:
        self.now += after
        return self.tray.scan(lambda: self.now)

    def drop(self, name: str, data: bytes) -> Path:
        path = self.incoming / name
        path.write_bytes(data)
        path.chmod(0o640)
        return path

    def listed(self, folder: Path) -> list[str]:
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def test_a_good_recipe_is_taken_and_its_file_removed(box: Box) -> None:
    box.drop("night.toml", GOOD)
    box.scan()
    box.scan(1.0)
    assert [(one.label, one.recipe) for one in box.taken] == [("night", Recipe(model="ollama:m"))]
    assert box.listed(box.incoming) == []
    assert box.gone == [box.taken[0].claim]


def test_the_clients_id_is_kept(box: Box) -> None:
    job_id = new_id()
    box.drop(f"{job_id}.night.toml", GOOD)
    box.scan()
    box.scan(1.0)
    assert (box.taken[0].id, box.taken[0].label) == (job_id, "night")


def test_a_bad_recipe_is_rejected_with_its_reason_and_the_next_is_taken(box: Box) -> None:
    box.drop("bad.toml", b'model = "ollama:m"\n[edit]\nstrenght = 1.0\n')
    box.drop("good.toml", GOOD)
    box.scan()
    box.scan(1.0)
    assert [one.label for one in box.taken] == ["good"]
    assert box.listed(box.incoming) == ["bad.toml"], "an editor may still be at it"
    box.scan(5.0)
    assert box.listed(box.rejected) == ["bad.reason.json", "bad.reason.txt", "bad.toml"]
    reason = (box.rejected / "bad.reason.txt").read_text()
    assert "line 3" in reason
    assert "strength" in reason
    assert box.listed(box.incoming) == []


def test_a_file_somebody_still_writes_is_left_alone(box: Box) -> None:
    with (box.incoming / "slow.toml").open("wb") as writer:
        writer.write(GOOD)
        writer.flush()
        assert box.scan() is not None
        assert box.taken == []
        writer.write(b"[edit]\nstrength = 0.5\n")
    (box.incoming / "slow.toml").chmod(0o640)
    box.scan(0.01)
    box.scan(1.0)
    assert [one.recipe.edit.strength for one in box.taken] == [0.5]


@pytest.mark.skipif(not hasattr(fcntl, "F_SETLEASE"), reason="Linux's own")
def test_the_kernel_tells_whether_somebody_writes_so_that_nobody_waits_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("x")
    with path.open() as file:
        try:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError as error:
            pytest.skip(f"this filesystem leases nothing: {error}")
    folder = folder_descriptor(tmp_path)
    try:
        with path.open("a"):
            written = read_entry(folder, "a.toml", known_owners())
        closed = read_entry(folder, "a.toml", known_owners())
    finally:
        os.close(folder)
    assert written is not None and closed is not None
    assert (written.writer_gone, closed.writer_gone) == (False, True)


def test_a_full_disk_loses_nothing(box: Box) -> None:
    box.drop("night.toml", GOOD)
    box.fail = DiskError("no space")
    box.scan()
    assert box.scan(1.0) == 1.0
    assert box.listed(box.incoming) == ["night.toml"]
    box.fail = None
    box.scan(1.0)
    assert [one.label for one in box.taken] == ["night"]


def test_a_policy_can_refuse_what_reads_well(tmp_path: Path) -> None:
    def refuse(recipe: Recipe) -> None:
        raise RecipeError("not here", remedy="elsewhere")

    (tmp_path / "incoming").mkdir()
    (tmp_path / "incoming" / "a.toml").write_bytes(GOOD)
    (tmp_path / "incoming" / "a.toml").chmod(0o640)
    tray = Tray(tmp_path / "incoming", tmp_path / "rejected", refuse, lambda accepted: None, lambda claim: None)
    tray.scan(lambda: 0.0)
    tray.scan(lambda: 6.0)
    assert "not here" in (tmp_path / "rejected" / "a.reason.txt").read_text()


def link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def hard_link(path: Path, outside: Path) -> None:
    os.link(outside, path)


def fifo(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path, outside: Path) -> None:
    here = Path.cwd()
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(path.parent)  # a socket's address is short
        try:
            listener.bind(path.name)
        finally:
            os.chdir(here)


def open_to_all(path: Path, outside: Path) -> None:
    path.write_bytes(GOOD)
    path.chmod(0o666)


def huge(path: Path, outside: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)
    path.chmod(0o640)


def null_bytes(path: Path, outside: Path) -> None:
    path.write_bytes(b"\0" * 5000)
    path.chmod(0o640)


@pytest.mark.parametrize("make", [link, hard_link, fifo, unix_socket, open_to_all, huge, null_bytes])
def test_a_hostile_entry_is_neither_followed_nor_fatal(
    box: Box, tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    outside = tmp_path / "outside.toml"
    outside.write_bytes(GOOD)
    outside.chmod(0o640)
    make(box.incoming / "evil.toml", outside)
    box.drop("good.toml", GOOD)
    box.scan()
    box.scan(1.0)
    box.scan(6.0)
    assert [one.label for one in box.taken] == ["good"]
    assert outside.read_bytes() == GOOD, "what a link names is never touched"
    assert box.listed(box.rejected) == ["evil.reason.json", "evil.reason.txt", "evil.toml"], (
        "moved there, not destroyed"
    )
    assert box.listed(box.incoming) == []


def test_a_folder_named_like_a_recipe_is_moved_aside_once(box: Box) -> None:
    (box.incoming / "folder.toml").mkdir()
    box.drop("good.toml", GOOD)
    for _ in range(3):
        box.scan(6.0)
    assert [one.label for one in box.taken] == ["good"]
    assert box.listed(box.rejected) == ["folder.reason.json", "folder.reason.txt", "folder.toml"]


def test_a_recipe_that_anybody_may_write_to_is_refused_with_its_bytes_kept(box: Box) -> None:
    box.drop("mine.toml", GOOD).chmod(0o666)
    box.scan()
    box.scan(6.0)
    assert (box.rejected / "mine.toml").read_bytes() == GOOD


def test_what_was_rejected_before_is_not_overwritten(box: Box) -> None:
    for text in (b"first = ", b"second = "):
        box.drop("bad.toml", text)
        box.scan()
        box.scan(6.0)
    assert (box.rejected / "bad.toml").read_bytes() == b"first = "
    assert (box.rejected / "bad.2.toml").read_bytes() == b"second = "


def test_a_long_name_in_another_script_stops_nobody(box: Box) -> None:
    box.drop("漢" * 82 + ".toml", b"modle = 1")
    box.drop("漢good.toml", GOOD)
    box.scan()
    box.scan(1.0)
    box.scan(6.0)
    assert [one.label for one in box.taken] == ["漢good"]
    assert box.listed(box.incoming) == []
    assert len(box.listed(box.rejected)) == 3


def test_a_rejection_that_cannot_be_written_loses_nothing_and_stops_nobody(box: Box) -> None:
    box.rejected.write_text("a file where the folder should be")
    box.drop("bad.toml", b"nonsense")
    box.drop("good.toml", GOOD)
    box.scan()
    assert box.scan(6.0) == 5.0
    assert [one.label for one in box.taken] == ["good"]
    assert box.listed(box.incoming) == ["bad.toml"]


def test_names_cannot_move_a_terminal_or_a_path() -> None:
    assert printable("\x1b[31mred\u202e.toml") == "__31mred_.toml"
    assert "/" not in printable("../../etc")
    with contextlib.suppress(UnicodeError):
        assert printable("\udcff\udcfe.toml")
    assert identity("x" * 300 + ".toml")[1] == "x" * 160


def test_a_newer_file_of_the_same_name_is_not_removed_with_the_old_one(box: Box) -> None:
    box.drop("night.toml", GOOD)

    def swap(accepted: Accepted) -> None:
        box.taken.append(accepted)
        if len(box.taken) == 1:
            replacement = box.drop("night.toml.new", b'model = "ollama:other"\n')
            replacement.replace(box.incoming / "night.toml")

    box.tray.accept = swap
    for _ in range(4):
        box.scan(1.0)
    assert [one.recipe.model for one in box.taken] == ["ollama:m", "ollama:other"]
