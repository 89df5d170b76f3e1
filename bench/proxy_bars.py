"""What the proxy promises, what was measured, and whether it holds: kept in bench/results.json part by part.

Does not know how anything is measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).with_name("results.json")
KEY = "proxy_bars"


class Row(NamedTuple):
    """`sense`: which side of the bar is good."""

    what: str
    measured: float
    sense: str
    bar: float

    @property
    def good(self) -> bool:
        match self.sense:
            case "<=":
                return self.measured <= self.bar
            case ">=":
                return self.measured >= self.bar
            case "<":
                return self.measured < self.bar
        return self.measured == self.bar


def record(rows: Iterable[Row], figures: dict[str, object] | None = None) -> None:
    """Replace these rows (and figures); the others stay as they were measured."""
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    bars = known.setdefault(KEY, {})
    for row in rows:
        bars[row.what] = {"measured": round(row.measured, 4), "bar": f"{row.sense} {row.bar:g}", "holds": row.good}
    known.update(figures or {})
    RESULTS.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


def table(rows: Iterable[Row]) -> str:
    return "\n".join(
        f"{row.what:58}{row.measured:12.3f}{row.sense:>4}{row.bar:9.2f}  {'ok' if row.good else 'OVER'}" for row in rows
    )
