"""Looks at the in-tray: every scan settles what can be settled. Called in one thread; slow disks never stop the daemon.

What a good recipe becomes is told by two callables; it does not know the journal.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import msgspec

from abliterate.contract.errors import AbliteratedError, RecipeError
from abliterate.contract.ids import ULID, new_id
from abliterate.contract.messages import ErrorBody
from abliterate.contract.recipe import Recipe, parse_recipe
from abliterated.failpoints import failpoint
from abliterated.files import write_whole
from abliterated.spool.claim import Entry, Refused, folder_descriptor, known_owners, read_entry, remove_entry
from abliterated.spool.settle import Sighting, concerns, settle

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Accepted:
    """A recipe that was read, on its way to the journal."""

    id: str
    label: str
    recipe: Recipe
    data: bytes
    claim: str


@dataclass
class Tray:
    """The state between scans: since when each file looks as it does.

    `accept` makes a job and must be safe to repeat; `gone` is told a claim once its file is removed.
    """

    incoming: Path
    rejected: Path
    check: Callable[[Recipe], None]
    accept: Callable[[Accepted], None]
    gone: Callable[[str], None]
    _since: dict[str, tuple[str, float]] = field(default_factory=dict)

    def scan(self, now: Callable[[], float] = time.monotonic) -> float | None:
        """Look at every entry once; returns after how many seconds a waiting one should be looked at again."""
        self.incoming.mkdir(parents=True, exist_ok=True)
        folder = folder_descriptor(self.incoming)
        try:
            names = sorted(name for name in os.listdir(folder) if concerns(name))  # noqa: PTH208 - by descriptor
            self._since = {name: seen for name, seen in self._since.items() if name in names}
            waits = [wait for name in names if (wait := self._look_safely(folder, name, now)) is not None]
        finally:
            os.close(folder)
        return min(waits, default=None)

    def _look_safely(self, folder: int, name: str, now: Callable[[], float]) -> float | None:
        try:
            return self._look(folder, name, now)
        except (AbliteratedError, OSError) as error:
            # One entry that can't be dealt with must not keep the others waiting.
            log.error("%s: %s", printable(name), error, extra={"action": "spool"})
            return 5.0

    def _look(self, folder: int, name: str, now: Callable[[], float]) -> float | None:
        try:
            entry = read_entry(folder, name, known_owners())
        except Refused as error:
            return self._reject_unread(folder, name, error, now())
        if entry is None:
            return 0.05
        key, since = self._since.get(name, ("", 0.0))
        if key != entry.key:
            since = now()
            self._since[name] = (entry.key, since)
        recipe, problem = self._read(entry)
        verdict, wait = settle(Sighting(since, entry.writer_gone, recipe is not None), now())
        if verdict == "wait":
            return wait
        if recipe is not None:
            return self._accept(folder, entry, recipe)
        assert problem is not None
        self._reject(entry.name, entry.data, problem)
        failpoint("tray.rejected")
        remove_entry(folder, entry)
        return None

    def _read(self, entry: Entry) -> tuple[Recipe | None, RecipeError | None]:
        try:
            recipe = parse_recipe(entry.data, printable(entry.name))
            self.check(recipe)
        except RecipeError as error:
            return None, error
        return recipe, None

    def _accept(self, folder: int, entry: Entry, recipe: Recipe) -> float | None:
        job_id, label = identity(entry.name)
        try:
            self.accept(Accepted(job_id, label, recipe, entry.data, entry.key))
        except RecipeError as error:
            self._reject(entry.name, entry.data, error)
            remove_entry(folder, entry)
            return None
        except (AbliteratedError, OSError) as error:
            # The file stays; nothing is lost, and the next scan tries again.
            log.error("%s could not be taken: %s", printable(entry.name), error, extra={"action": "spool"})
            return 1.0
        failpoint("tray.accepted")
        remove_entry(folder, entry)
        failpoint("tray.removed")
        self.gone(entry.key)
        failpoint("tray.gone")
        return None

    def _reject_unread(self, folder: int, name: str, error: Refused, now: float) -> float | None:
        key, since = self._since.setdefault(name, (error.message, now))
        if key != error.message:
            self._since[name] = (error.message, since := now)
        verdict, wait = settle(Sighting(since, writer_gone=False, good=False), now)
        if verdict == "wait":
            return wait
        stem = self._reject(name, b"", error)
        # Moved, not read: nothing is lost, and a link moves as a link, whatever it names.
        target = folder_descriptor(self.rejected)
        try:
            os.rename(name, f"{stem}.toml", src_dir_fd=folder, dst_dir_fd=target)
        finally:
            os.close(target)
        return None

    def _reject(self, name: str, data: bytes, error: RecipeError) -> str:
        """Write reason and bytes to the rejected folder; returns the stem they got there."""
        self.rejected.mkdir(parents=True, exist_ok=True)
        safe = printable(name)
        stem = self._stem(shortened(safe.removesuffix(".toml"), 150), data, f"{error}\n".encode())
        if data:
            write_whole(self.rejected / f"{stem}.toml", data, mode=0o640)
        write_whole(self.rejected / f"{stem}.reason.txt", f"{error}\n".encode(), mode=0o640)
        body = ErrorBody(error=error.message, remedy=error.remedy, exit_code=error.exit_code)
        write_whole(self.rejected / f"{stem}.reason.json", msgspec.json.encode(body), mode=0o640)
        log.warning("rejected %s: %s", safe, error.message, extra={"action": "rejected"})
        return stem

    def _stem(self, stem: str, data: bytes, reason: bytes) -> str:
        """`stem`, or `stem.2`, …: what was rejected before is not overwritten, unless it is this very rejection,
        which a death interrupted."""
        numbered = (stem if number == 1 else f"{stem}.{number}" for number in count(1))
        return next(name for name in numbered if self._mine(name, data, reason))

    def _mine(self, stem: str, data: bytes, reason: bytes) -> bool:
        kept, told = (self.rejected / f"{stem}{suffix}" for suffix in (".toml", ".reason.txt"))
        if not os.path.lexists(kept):
            return not told.exists() or told.read_bytes() == reason
        return bool(data) and kept.is_file() and not kept.is_symlink() and kept.read_bytes() == data


def identity(name: str) -> tuple[str, str]:
    """Job id and label of a file name: `<ulid>.<label>.toml` as the client writes it, or `<label>.toml`."""
    stem = name.removesuffix(".toml")
    head, _, rest = stem.partition(".")
    if ULID.fullmatch(head):
        return head, printable(rest or head)
    return new_id(), printable(stem)


def printable(name: str) -> str:
    """A file name without what could move a terminal or a path."""
    return shortened(re.sub(r"[^\w.@+ -]", "_", name.encode("utf-8", "replace").decode()), 160) or "_"


def shortened(text: str, limit: int) -> str:
    """The beginning of `text` that takes at most `limit` bytes: file systems count bytes."""
    return text.encode()[:limit].decode("utf-8", "ignore")
