"""A disk that is really full, at each write in turn: a small filesystem with so much room left and no more.

`python -m faults.full [--step BYTES]` prints what came of it as JSON. Needs the right to mount.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from abliterated.jobs.journal import Journal
from faults.house import MiniDaemon
from faults.matrix import drop, problems, tell

PAGE = 4096
FULL_SECONDS = 0.5  # what a daemon does while its disk is full: try again
ROOMY = 40 * 1024**2


@contextmanager
def small(megabytes: int = 80) -> Iterator[Path]:
    """A filesystem of its own. Raises PermissionError where none can be mounted."""
    with tempfile.TemporaryDirectory(prefix="abl-full-") as name:
        argv = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", name]
        if subprocess.run(argv, capture_output=True).returncode:
            raise PermissionError("no filesystem can be mounted here")
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", "-l", name], check=True)


def leave(place: Path, room: int) -> Path:
    """Fill the filesystem but for `room` bytes."""
    ballast = place / "ballast"
    found = os.statvfs(place)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(PAGE, found.f_bavail * found.f_frsize - room))
    return ballast


def served(root: Path, seconds: float) -> int:
    """A daemon in a fork, for so long; its wait status."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    code = 70
    try:
        asyncio.run(MiniDaemon(root).serve(seconds))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def story(place: Path, room: int, spare: bool, patience: float) -> tuple[list[str], bool]:
    """Recipes come, `room` bytes are left; later there is more. What is wrong, and whether the room was too little."""
    root = place / f"run{room}"
    recipes = drop(root)
    if spare:
        Journal(root / "journal.sqlite3").close()
    ballast = leave(place, room)
    short = served(root, patience) != 0
    ballast.unlink()
    found = []
    if (root / "journal.sqlite3").exists():
        journal = Journal(root / "journal.sqlite3")
        if (told := journal._db.execute("PRAGMA integrity_check").fetchone()[0]) != "ok":
            found.append(f"wrong journal: {told}")
        journal.close()
    status = served(root, 120)
    found += problems(root, recipes) if status == 0 else [f"the last daemon ended with {status}"]
    shutil.rmtree(root)
    return found, short


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--step", type=int, default=PAGE)
    options = parser.parse_args()
    begun = time.monotonic()
    runs = full = room = 0
    with small() as place:
        wrong, short = story(place, ROOMY, True, 120)
        assert not short, wrong
        # What a daemon with room takes here tells which one has none.
        patience = max(FULL_SECONDS, 5 * (time.monotonic() - begun))
        enough = 0
        # Until two steps in a row had room enough, with and without the journal's spare file.
        while enough < 2:
            shorts = []
            for spare in (True, False):
                found, short = story(place, room, spare, patience)
                wrong += [f"{room} bytes left: {one}" for one in found]
                runs, full = runs + 1, full + short
                shorts.append(short)
            enough = 0 if any(shorts) else enough + 1
            room += options.step
    return tell({"runs": runs, "full": full, "room": room - options.step}, wrong, begun)


if __name__ == "__main__":
    sys.exit(main())
