"""What nobody should put into the in-tray: nothing of it is followed or run, nothing stops the daemon."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from abliterate.contract.recipe import Recipe
from abliterated.spool.settle import PATIENCE
from abliterated.spool.tray import Accepted, Tray

GOOD = b'model = "ollama:m"\n'
SECRET = b'model = "ollama:secret"\n'


def write(path: Path, data: bytes = GOOD, mode: int = 0o640) -> None:
    path.write_bytes(data)
    path.chmod(mode)


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(path.parent):  # a socket's address is short
        made.bind(path.name)


def sparse(path: Path) -> None:
    write(path)
    os.truncate(path, 1 << 40)


def chained(path: Path) -> None:
    path.with_name("inner.toml").symlink_to(path.with_name("loop.toml"))
    path.with_name("loop.toml").symlink_to(path.with_name("inner.toml"))
    path.symlink_to("inner.toml")


def full(path: Path) -> None:
    path.mkdir()
    write(path / "x.toml")


def owned(path: Path) -> None:
    write(path)
    os.chown(path, 65534, 65534)


def device(path: Path) -> None:
    os.mknod(path, 0o20666, os.makedev(1, 5))  # /dev/zero


# Of each: its name, how it is put there, and whether it is a good recipe all the same.
ENTRIES: list[tuple[str, Callable[[Path], None], bool]] = [
    ("link.toml", lambda p: p.symlink_to(p.parent.parent / "secret.toml"), False),
    ("dangling.toml", lambda p: p.symlink_to("/nowhere/at/all"), False),
    ("chain.toml", chained, False),
    ("proc.toml", lambda p: p.symlink_to("/proc/self/environ"), False),
    ("stdin.toml", lambda p: p.symlink_to("/dev/stdin"), False),
    ("hard.toml", lambda p: os.link(p.parent.parent / "secret.toml", p), False),
    ("fifo.toml", lambda p: os.mkfifo(p), False),
    ("socket.toml", bind, False),
    ("folder.toml", lambda p: p.mkdir(), False),
    ("full.toml", full, False),
    ("zero-device.toml", device, False),
    ("stranger.toml", owned, False),
    ("world.toml", lambda p: write(p, mode=0o666), False),
    ("empty.toml", lambda p: write(p, b""), False),
    ("large.toml", lambda p: write(p, b"#" * (64 * 1024 + 1)), False),
    ("sparse.toml", sparse, False),
    ("binary.toml", lambda p: write(p, bytes(range(256))), False),
    ("bomb.toml", lambda p: write(p, b"a." * 30_000 + b"b = 1"), False),
    ("brackets.toml", lambda p: write(p, b"a = " + b"[" * 60_000), False),
    ("relative.toml", lambda p: write(p, b'model = "../../etc/passwd.gguf"\n'), False),
    ("\x1b[2J\x1b]0;owned\x07.toml", lambda p: write(p), True),
    ("new\nline.toml", lambda p: write(p), True),
    ("--help.toml", lambda p: write(p), True),
    ("\u202elmot.toml", lambda p: write(p), True),
    ("n" * 250 + ".toml", lambda p: write(p), True),
    (os.fsdecode(b"\xff\xfe.toml"), lambda p: write(p), True),
    ("$(touch pwned).toml", lambda p: write(p), True),
    ("%2e%2e%2fetc.toml", lambda p: write(p), True),
    ("unreadable.toml", lambda p: write(p, mode=0o200), os.geteuid() == 0),
]


@dataclass
class Seen:
    recipes: list[Accepted] = field(default_factory=list)

    def check(self, recipe: Recipe) -> None:
        if recipe.model.startswith(".."):
            from abliterate.contract.errors import RecipeError

            raise RecipeError("relative", remedy="no")


@pytest.mark.skipif(os.geteuid() != 0, reason="devices and strangers' files need root")
def test_hostile_entries_are_neither_followed_nor_fatal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert len(ENTRIES) >= 25
    incoming, rejected, seen = tmp_path / "incoming", tmp_path / "rejected", Seen()
    incoming.mkdir()
    write(tmp_path / "secret.toml", SECRET)
    for name, put, _ in ENTRIES:
        put(incoming / name)
    tray = Tray(incoming, rejected, seen.check, seen.recipes.append, lambda claim: None)
    clock = iter(range(0, 1000, int(PATIENCE) + 1))
    for _ in range(6):
        moment = float(next(clock))
        tray.scan(lambda now=moment: now)  # type: ignore[misc]
    good = sum(accepted for _, _, accepted in ENTRIES)
    assert len(seen.recipes) == good
    assert {accepted.data for accepted in seen.recipes} == {GOOD}
    assert all(accepted.label.isprintable() and "/" not in accepted.label for accepted in seen.recipes)
    assert list(incoming.iterdir()) == []
    for path in rejected.iterdir():
        assert path.name.isprintable()
        if path.name.endswith(".reason.txt"):
            assert SECRET.decode() not in path.read_text()
            assert "\x1b" not in path.read_text()
    assert (tmp_path / "secret.toml").read_bytes() == SECRET, "what a link names is not touched"
    assert not (tmp_path / "pwned").exists()
    assert "\x1b" not in capfd.readouterr().err
    write(incoming / "after.toml")
    tray.scan(lambda: 5000.0)
    tray.scan(lambda: 5001.0)
    assert len(seen.recipes) == good + 1, "the daemon goes on"
