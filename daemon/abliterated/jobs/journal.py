"""The journal: one SQLite row a job, one row a transition; the only truth about the queue.

WAL with synchronous=FULL: what was answered has reached the disk. One connection, one thread (`jobs/ledger.py`).
Does not know the scheduler, the spool or the worker.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from abliterate.contract.errors import AbliteratedError, DiskError, NotFound
from abliterate.contract.messages import Failure, Result
from abliterate.contract.recipe import Recipe, Schedule, recipe_digest, target_name
from abliterate.contract.states import TERMINAL, Reason, State, check_transition
from abliterated.failpoints import failpoint
from abliterated.jobs.schema import MIGRATIONS, migrate, version_of
from abliterated.jobs.spare import Spare

T = TypeVar("T")


class JournalError(AbliteratedError):
    """The journal can't be opened or read."""


@dataclass(frozen=True)
class Job:
    """A row of the journal. Times are seconds since the epoch; `retry_at` 0 means at once."""

    seq: int
    id: str
    label: str
    recipe: Recipe
    digest: str
    model: str
    target: str
    state: State
    reason: Reason
    explanation: str
    stage: str
    attempts: int
    crashes: int
    retry_at: float
    submitted: float
    started: float | None
    ended: float | None
    failure: Failure | None
    result: Result | None
    worker: str
    base: str = ""


_COLUMNS = (
    "seq, id, label, recipe, digest, model, target, state, reason, explanation, stage, attempts, crashes, retry_at,"
    " submitted, started, ended, failure, result, worker, base"
)
_CHANGEABLE = frozenset({"stage", "attempts", "crashes", "retry_at", "started", "failure", "result", "worker", "base"})
_NO_ROOM = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_FSYNC})


class Journal:
    """Open it in the thread that will use it. `wall`: the clock of its rows, seconds since the epoch."""

    def __init__(self, path: Path, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._spare = Spare(path.with_name("reserve.bin"))
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
        except sqlite3.Error as error:
            raise _unopened(path, error) from error
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA foreign_keys=ON")
            _check_version(self._db, path)
            migrate(self._db)
        except sqlite3.Error as error:
            self._db.close()
            raise _unopened(path, error) from error
        except JournalError:
            self._db.close()
            raise
        self._spare.fill()

    def close(self) -> None:
        self._db.close()

    # --- jobs ---------------------------------------------------------------------------------------------------

    def add(
        self,
        job_id: str,
        label: str,
        recipe: Recipe,
        *,
        claim: str = "",
        actor: str = "spool",
        existing_ok: bool = True,
    ) -> tuple[Job, bool]:
        """Add a job in `queued` (or `held`); returns it, and whether it is new. A known id adds nothing."""
        if existing_ok and (known := self.find(job_id)):
            return known, False
        return self.add_all([(job_id, recipe)], label, claim=claim, actor=actor)[0], True

    def add_all(
        self, wanted: Sequence[tuple[str, Recipe]], label: str, *, claim: str = "", actor: str = "spool"
    ) -> list[Job]:
        """Add the jobs of one file, all or none."""
        now = self._wall()

        def insert() -> None:
            for number, (job_id, recipe) in enumerate(wanted):
                state: State = "held" if recipe.schedule.hold else "queued"
                reason: Reason = "user" if recipe.schedule.hold else "ready"
                # The claim belongs to the first: one file, one claim.
                mine = claim if number == 0 else ""
                self._db.execute(
                    "INSERT INTO job (id, label, recipe, digest, model, target, state, reason, submitted, claim, gone,"
                    " work) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        job_id,
                        label,
                        msgspec.json.encode(recipe).decode(),
                        recipe_digest(recipe),
                        recipe.model,
                        target_name(recipe).short(),
                        state,
                        reason,
                        now,
                        mine,
                        0 if mine else 1,
                        work_digest(recipe),
                    ),
                )
                self._record(job_id, "", state, reason, actor, now)

        self._write(insert)
        return [self.get(job_id) for job_id, _ in wanted]

    def get(self, job_id: str) -> Job:
        """The job of exactly that id. Raises NotFound."""
        job = self.find(job_id)
        if job is None:
            raise NotFound(f"no job {job_id}", remedy="`abliterate status` lists them")
        return job

    def find(self, job_id: str) -> Job | None:
        row = self._db.execute(f"SELECT {_COLUMNS} FROM job WHERE id = ?", (job_id,)).fetchone()
        return _job(row) if row else None

    def match(self, part: str) -> Job:
        """The job whose id begins or ends with `part` (≥ 4 characters), else the one that has it elsewhere, as
        who types the first letters of an ending writes it. Raises NotFound for none or several."""
        if exact := self.find(part):
            return exact
        found: list[tuple[str]] = []
        if len(part) >= 4 and part.isalnum():
            find = "SELECT id FROM job WHERE id LIKE ? OR id LIKE ? LIMIT 2"
            found = (
                self._db.execute(find, (f"{part}%", f"%{part}")).fetchall()
                or self._db.execute(find, (f"%{part}%", "")).fetchall()
            )
        if len(found) != 1:
            what = "several jobs match" if found else "no job"
            raise NotFound(f"{what} {part!r}", remedy="`abliterate status` lists them with their ids")
        return self.get(found[0][0])

    def jobs(self) -> list[Job]:
        """Every job not yet cleaned away, oldest first."""
        return [_job(row) for row in self._db.execute(f"SELECT {_COLUMNS} FROM job ORDER BY seq")]

    def active(self) -> list[Job]:
        """Every job that has not ended, oldest first."""
        marks = ",".join("?" * len(TERMINAL))
        rows = self._db.execute(
            f"SELECT {_COLUMNS} FROM job WHERE state NOT IN ({marks}) ORDER BY seq", tuple(TERMINAL)
        )
        return [_job(row) for row in rows]

    def ended_by_label(self) -> dict[str, State]:
        """How each label ended: `succeeded` where the latest job of each of its products did; `schedule.after` asks."""
        rows = self._db.execute(
            "SELECT label, state FROM job WHERE seq IN"
            " (SELECT max(seq) FROM job WHERE ended IS NOT NULL GROUP BY label, target) ORDER BY state = 'succeeded'"
        )
        found: dict[str, State] = {}
        for label, state in rows:
            found.setdefault(label, state)
        return found

    def done_before(self, job: Job, base: str) -> Job | None:
        """The latest job that did the same work on the same base and succeeded."""
        row = self._db.execute(
            f"SELECT {_COLUMNS} FROM job WHERE state = 'succeeded' AND base = ? AND base != '' AND id != ?"
            " AND work = (SELECT work FROM job WHERE id = ?) AND work != '' ORDER BY seq DESC LIMIT 1",
            (base, job.id, job.id),
        ).fetchone()
        return _job(row) if row else None

    def last_ended(self, count: int = 20) -> list[Job]:
        """The jobs that ended last, the latest first."""
        rows = self._db.execute(
            f"SELECT {_COLUMNS} FROM job WHERE ended IS NOT NULL ORDER BY ended DESC LIMIT ?", (count,)
        )
        return [_job(row) for row in rows]

    def ended_before(self, wall: float) -> list[str]:
        """The ids of the jobs that had ended at that time, oldest first."""
        rows = self._db.execute("SELECT id FROM job WHERE ended < ? ORDER BY seq", (wall,))
        return [str(row[0]) for row in rows]

    def move(
        self,
        job_id: str,
        new: State,
        /,
        *,
        reason: Reason = "",
        explanation: str = "",
        actor: str = "daemon",
        **changes: Any,
    ) -> tuple[Job, int]:
        """Make one legal transition; returns job and transition number. Raises IllegalTransition, NotFound."""
        assert changes.keys() <= _CHANGEABLE, changes
        now = self._wall()

        def transition() -> int:
            job = self.get(job_id)
            check_transition(job.state, new)
            values: dict[str, Any] = {"state": new, "reason": reason, "explanation": explanation, "retry_at": 0.0}
            values |= {key: _text(value) for key, value in changes.items()}
            values["ended"] = now if new in TERMINAL else None
            self._update(job_id, values)
            return self._record(job_id, job.state, new, reason, actor, now)

        number = self._write(transition)
        return self.get(job_id), number

    def note(self, job_id: str, /, **changes: Any) -> None:
        """Change what is known of a job without a transition (reason, explanation, stage, …)."""
        assert changes.keys() <= _CHANGEABLE | {"reason", "explanation"}, changes
        self._write(lambda: self._update(job_id, {key: _text(value) for key, value in changes.items()}))

    def remove(self, job_ids: Sequence[str]) -> None:
        """Forget ended jobs, their transitions too."""

        def delete() -> None:
            for job_id in job_ids:
                if self._db.execute("DELETE FROM job WHERE id = ? AND ended IS NOT NULL", (job_id,)).rowcount:
                    self._db.execute("DELETE FROM transition WHERE job = ?", (job_id,))

        self._write(delete)

    # --- claims -------------------------------------------------------------------------------------------------

    def claimed(self, claim: str) -> str | None:
        """The job already made of this very file, whose file was not yet removed."""
        row = self._db.execute("SELECT id FROM job WHERE claim = ? AND gone = 0", (claim,)).fetchone()
        return str(row[0]) if row else None

    def file_gone(self, claim: str) -> None:
        """The file is removed: the same bytes under the same inode are a new recipe from now on."""
        self._write(lambda: self._db.execute("UPDATE job SET gone = 1 WHERE claim = ? AND gone = 0", (claim,)))

    def ids(self) -> set[str]:
        """The ids of every job there is."""
        return {str(row[0]) for row in self._db.execute("SELECT id FROM job")}

    # --- transitions and settings -------------------------------------------------------------------------------

    def transitions_after(self, number: int) -> list[tuple[int, str]]:
        """(number, job id) of every transition after `number`, of jobs not yet cleaned away."""
        return self._db.execute(
            "SELECT n, job FROM transition WHERE n > ? AND job IN (SELECT id FROM job) ORDER BY n", (number,)
        ).fetchall()

    def history(self, job_id: str) -> list[tuple[str, str, str, float, str]]:
        """(from, to, reason, wall clock, who) of every transition of a job, in order."""
        return self._db.execute(
            "SELECT old, new, reason, wall, actor FROM transition WHERE job = ? ORDER BY n", (job_id,)
        ).fetchall()

    def last_transition(self) -> int:
        row = self._db.execute("SELECT max(n) FROM transition").fetchone()
        return int(row[0] or 0)

    def setting(self, key: str, default: str = "") -> str:
        row = self._db.execute("SELECT value FROM setting WHERE key = ?", (key,)).fetchone()
        return str(row[0]) if row else default

    def set_setting(self, key: str, value: str) -> None:
        self._write(lambda: self._db.execute("INSERT OR REPLACE INTO setting VALUES (?, ?)", (key, value)))

    # --- inside -------------------------------------------------------------------------------------------------

    def _update(self, job_id: str, values: dict[str, Any]) -> None:
        columns = ", ".join(f"{key} = ?" for key in values)
        self._db.execute(f"UPDATE job SET {columns} WHERE id = ?", (*values.values(), job_id))

    def _record(self, job_id: str, old: str, new: str, reason: str, actor: str, now: float) -> int:
        cursor = self._db.execute(
            "INSERT INTO transition (job, old, new, reason, wall, boottime, boot, actor)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (job_id, old, new, reason, now, _boottime(), _boot(), actor),
        )
        return int(cursor.lastrowid or 0)

    def _write(self, act: Callable[[], T]) -> T:
        """Run `act` in one transaction; where the disk is full, the spare file makes room for one more try."""
        try:
            try:
                return self._transaction(act)
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode not in _NO_ROOM or not self._spare.give():
                    raise
                return self._transaction(act)
        except sqlite3.Error as error:
            raise DiskError(f"the journal can't be written ({error})", remedy="Free some disk space") from error

    def _transaction(self, act: Callable[[], T]) -> T:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            done = act()
            failpoint("journal.before-commit")
            self._db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # SQLite may have rolled back by itself; the cause is what counts
                self._db.execute("ROLLBACK")
            raise
        failpoint("journal.after-commit")
        return done

    def refill(self) -> None:
        """Put the spare file back where there is room again."""
        self._spare.fill()


def work_digest(recipe: Recipe) -> str:
    """sha256 of what a recipe makes, whenever it may run and whatever may be overwritten."""
    return recipe_digest(msgspec.structs.replace(recipe, schedule=Schedule(), force=False, replace=False))


def _check_version(database: sqlite3.Connection, path: Path) -> None:
    if (version := version_of(database)) > len(MIGRATIONS):
        raise JournalError(
            f"{path}: written by a newer version (schema {version}, known {len(MIGRATIONS)})",
            remedy="Upgrade abliterated, or give this daemon another paths.state",
        )


def _unopened(path: Path, error: sqlite3.Error) -> JournalError:
    return JournalError(f"{path}: the journal can't be opened ({error})", remedy="Move it away to start afresh")


def _job(row: tuple[Any, ...]) -> Job:
    values = list(row)
    values[3] = _recipe(values[3])
    values[17] = msgspec.json.decode(values[17], type=Failure) if values[17] else None
    values[18] = msgspec.json.decode(values[18], type=Result) if values[18] else None
    return Job(*values)


@lru_cache(maxsize=512)
def _recipe(text: str) -> Recipe:
    """A queue is looked at often, and its recipes never change."""
    return msgspec.json.decode(text, type=Recipe)


def _text(value: Any) -> Any:
    return msgspec.json.encode(value).decode() if isinstance(value, msgspec.Struct) else value


def _boottime() -> float:
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename
