"""What a search has tried, on disk as it goes: one line of JSON a batch, so that a run that was killed goes on behind
its last whole line and comes to the same end. Does not know what the numbers mean.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = tuple[Any, ...]  # plain values


class Journal:
    """The batches of one search, by what they depend on (`inputs`). Another search's lines are dropped."""

    def __init__(self, path: Path, inputs: str) -> None:
        self._path, self._inputs = path, inputs
        self._known: dict[str, list[Row]] = {}
        whole = 0
        try:
            data = path.read_bytes()
        except OSError:
            data = b""
        for line in data.splitlines(keepends=True):
            entry = _entry(line)
            if entry is None or entry.get("inputs") != inputs:
                break
            self._known[entry["batch"]] = [tuple(row) for row in entry["rows"]]
            whole += len(line)
        if whole != len(data):
            with path.open("r+b") as file:
                file.truncate(whole)
                os.fsync(file.fileno())

    def recall(self, asked: Any) -> list[Row] | None:
        """What this very batch gave before."""
        return self._known.get(_digest(asked))

    def keep(self, asked: Any, rows: Sequence[Row]) -> None:
        """Remember a batch, on disk when this returns."""
        batch = _digest(asked)
        self._known[batch] = list(rows)
        line = json.dumps({"inputs": self._inputs, "batch": batch, "rows": rows}) + "\n"
        with self._path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())


def _digest(asked: Any) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
        return found if isinstance(found, dict) and isinstance(found["rows"], list) and found["batch"] else None
    except (ValueError, KeyError):
        return None
