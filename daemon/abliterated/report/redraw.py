"""Draws the page anew from the report beside it: after something was added to that. Does not know what was."""

from __future__ import annotations

from pathlib import Path

from abliterate.contract.errors import AbliteratedError, DiskError
from abliterate.contract.report import PAGE_FILE, REPORT_FILE, read_report
from abliterated.files import write_whole
from abliterated.report.document import page


def redraw(folder: Path) -> None:
    """Write `report.html` from `report.json`. Blocking. Raises UnreadableReport, DiskError."""
    try:
        report = read_report((folder / REPORT_FILE).read_bytes())
        write_whole(folder / PAGE_FILE, page(report).encode("utf-8", "replace"))
    except AbliteratedError:
        raise
    except OSError as error:
        raise DiskError(
            f"{folder.name}/{PAGE_FILE}: can't be written ({error.strerror})", remedy="Check that disk and its rights"
        ) from error
