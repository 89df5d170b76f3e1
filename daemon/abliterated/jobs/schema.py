"""The journal's tables, and the steps that brought them here: each once, in order, never changed after a release.

A step is a script run in one transaction with its number. Does not know jobs.
"""

from __future__ import annotations

import sqlite3

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
    # 2: what a job worked on and what it asked for, so that the same work is not done twice.
    """
    ALTER TABLE job ADD COLUMN base TEXT NOT NULL DEFAULT '';
    ALTER TABLE job ADD COLUMN work TEXT NOT NULL DEFAULT '';
    CREATE INDEX job_work ON job (work) WHERE state = 'succeeded';
    CREATE INDEX job_ended ON job (ended) WHERE ended IS NOT NULL;
    """,
)


def version_of(database: sqlite3.Connection) -> int:
    """The number of the last step the database has taken."""
    return int(database.execute("PRAGMA user_version").fetchone()[0])


def migrate(database: sqlite3.Connection) -> None:
    """Take the steps that are missing. Raises sqlite3.Error; a step is taken whole or not at all."""
    for number, script in enumerate(MIGRATIONS[version_of(database) :], version_of(database) + 1):
        database.executescript(f"BEGIN; {script} PRAGMA user_version={number}; COMMIT;")
