"""The journal: one SQLite row a job, one row a transition; the only truth about the queue.

WAL with synchronous=FULL: what was answered has reached the disk. One connection, one thread (`jobs/ledger.py`).
Does not know the scheduler, the spool or the worker.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from abliterate.contract.errors import AbliteratedError, DiskError, NotFound
from abliterate.contract.messages import Failure, Result
from abliterate.contract.recipe import Recipe, recipe_digest, target_name
from abliterate.contract.states import TERMINAL, Reason, State, check_transition

MIGRATIONS = (
    """
    CREATE TABLE job (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        label TEXT NOT NULL,
        recipe TEXT NOT NULL,
        digest TEXT NOT NULL,
        model TEXT NOT NULL,
        target TEXT NOT NULL,
        state TEXT NOT NULL,
        reason TEXT NOT NULL DEFAULT '',
        explanation TEXT NOT NULL DEFAULT '',
        stage TEXT NOT NULL DEFAULT '',
        attempts INTEGER NOT NULL DEFAULT 0,
        crashes INTEGER NOT NULL DEFAULT 0,
        retry_at REAL NOT NULL DEFAULT 0,
        submitted REAL NOT NULL,
        started REAL,
        ended REAL,
        failure TEXT,
        result TEXT,
        worker TEXT NOT NULL DEFAULT '',
        claim TEXT NOT NULL DEFAULT '',
        gone INTEGER NOT NULL DEFAULT 1
    );
    CREATE INDEX job_state ON job (state);
    CREATE INDEX job_claim ON job (claim) WHERE gone = 0;
    CREATE TABLE transition (
        n INTEGER PRIMARY KEY AUTOINCREMENT,
        job TEXT NOT NULL,
        old TEXT NOT NULL,
        new TEXT NOT NULL,
        reason TEXT NOT NULL,
        wall REAL NOT NULL,
        boottime REAL NOT NULL,
        boot TEXT NOT NULL,
        actor TEXT NOT NULL
    );
    CREATE TABLE setting (key TEXT PRIMARY KEY, value TEXT NOT NULL);
    """,
)


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


_COLUMNS = (
    "seq, id, label, recipe, digest, model, target, state, reason, explanation, stage, attempts, crashes, retry_at,"
    " submitted, started, ended, failure, result, worker"
)
_CHANGEABLE = frozenset({"stage", "attempts", "crashes", "retry_at", "started", "failure", "result", "worker"})


class Journal:
    """Open it in the thread that will use it."""

    def __init__(self, path: Path) -> None:
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
        except sqlite3.Error as error:
            raise _unopened(path, error) from error
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA foreign_keys=ON")
            self._migrate(path)
        except sqlite3.Error as error:
            self._db.close()
            raise _unopened(path, error) from error
        except JournalError:
            self._db.close()
            raise

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
        now = time.time()
        state: State = "held" if recipe.schedule.hold else "queued"
        reason: Reason = "user" if recipe.schedule.hold else "ready"
        with self._transaction():
            self._db.execute(
                "INSERT INTO job (id, label, recipe, digest, model, target, state, reason, submitted, claim, gone)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
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
                    claim,
                    0 if claim else 1,
                ),
            )
            self._record(job_id, "", state, reason, actor, now)
        return self.get(job_id), True

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
        """The job whose id begins or ends with `part` (≥ 4 characters). Raises NotFound for none or several."""
        if exact := self.find(part):
            return exact
        found: list[tuple[str]] = []
        if len(part) >= 4 and part.isalnum():
            found = self._db.execute(
                "SELECT id FROM job WHERE id LIKE ? OR id LIKE ? LIMIT 2", (f"{part}%", f"%{part}")
            ).fetchall()
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
        """The latest end of each label; what `schedule.after` waits for."""
        rows = self._db.execute("SELECT label, state FROM job WHERE ended IS NOT NULL ORDER BY seq")
        return dict(rows.fetchall())

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
        now = time.time()
        with self._transaction():
            job = self.get(job_id)
            check_transition(job.state, new)
            values: dict[str, Any] = {"state": new, "reason": reason, "explanation": explanation, "retry_at": 0.0}
            values |= {key: _text(value) for key, value in changes.items()}
            values["ended"] = now if new in TERMINAL else None
            self._update(job_id, values)
            number = self._record(job_id, job.state, new, reason, actor, now)
        return self.get(job_id), number

    def note(self, job_id: str, /, **changes: Any) -> None:
        """Change what is known of a job without a transition (reason, explanation, stage, …)."""
        assert changes.keys() <= _CHANGEABLE | {"reason", "explanation"}, changes
        with self._transaction():
            self._update(job_id, {key: _text(value) for key, value in changes.items()})

    def remove(self, job_id: str) -> None:
        """Forget an ended job."""
        with self._transaction():
            self._db.execute("DELETE FROM job WHERE id = ? AND ended IS NOT NULL", (job_id,))

    # --- claims -------------------------------------------------------------------------------------------------

    def claimed(self, claim: str) -> str | None:
        """The job already made of this very file, whose file was not yet removed."""
        row = self._db.execute("SELECT id FROM job WHERE claim = ? AND gone = 0", (claim,)).fetchone()
        return str(row[0]) if row else None

    def file_gone(self, claim: str) -> None:
        """The file is removed: the same bytes under the same inode are a new recipe from now on."""
        with self._transaction():
            self._db.execute("UPDATE job SET gone = 1 WHERE claim = ? AND gone = 0", (claim,))

    def ids(self) -> set[str]:
        """The ids of every job there is."""
        return {str(row[0]) for row in self._db.execute("SELECT id FROM job")}

    # --- transitions and settings -------------------------------------------------------------------------------

    def transitions_after(self, number: int) -> list[tuple[int, str]]:
        """(number, job id) of every transition after `number`."""
        return self._db.execute("SELECT n, job FROM transition WHERE n > ? ORDER BY n", (number,)).fetchall()

    def last_transition(self) -> int:
        row = self._db.execute("SELECT max(n) FROM transition").fetchone()
        return int(row[0] or 0)

    def setting(self, key: str, default: str = "") -> str:
        row = self._db.execute("SELECT value FROM setting WHERE key = ?", (key,)).fetchone()
        return str(row[0]) if row else default

    def set_setting(self, key: str, value: str) -> None:
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO setting (key, value) VALUES (?, ?)", (key, value))

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

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # SQLite may have rolled back by itself; the cause is what counts
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.OperationalError as error:
            raise DiskError(f"the journal can't be written ({error})", remedy="Free some disk space") from error

    def _migrate(self, path: Path) -> None:
        version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if version > len(MIGRATIONS):
            raise JournalError(
                f"{path}: written by a newer version (schema {version}, known {len(MIGRATIONS)})",
                remedy="Upgrade abliterated, or give this daemon another paths.state",
            )
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            self._db.executescript(f"BEGIN; {script} PRAGMA user_version={number}; COMMIT;")


def _unopened(path: Path, error: sqlite3.Error) -> JournalError:
    return JournalError(f"{path}: the journal can't be opened ({error})", remedy="Move it away to start afresh")


def _job(row: tuple[Any, ...]) -> Job:
    values = list(row)
    values[3] = msgspec.json.decode(values[3], type=Recipe)
    values[17] = msgspec.json.decode(values[17], type=Failure) if values[17] else None
    values[18] = msgspec.json.decode(values[18], type=Result) if values[18] else None
    return Job(*values)


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
