"""`abliterate report`: what a job did to its model, as a summary, as JSON, or as a page in the browser."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from abliterate.settings import daemon

if TYPE_CHECKING:
    from pathlib import Path

_DESCRIPTION = """\
Show what a job did to its model: refusals before and after, how close it stayed to the original, what
was edited, what it cost. The page shows it with pictures; it is one file and needs no network."""
_EPILOG = """\
examples:
  abliterate report 4kz9                    a summary
  abliterate report 4kz9 --open             the page, in a browser
  abliterate report 4kz9 --html > r.html    the page, wherever you want it
  abliterate report 4kz9 --json | jq .evaluation

exit codes: 0; 7 no such job, or it has no report; 69 the daemon does not answer."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument("id", metavar="ID", help="a job's id, or four or more characters of its ends")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--html", action="store_true", help="print the page")
    how.add_argument("--json", action="store_true", help="print report.json")
    how.add_argument("--open", action="store_true", help="open the page in a browser, and print where it lies")


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    server = daemon(args)
    if args.open:
        job = server.job(args.id).id
        path = _saved(job, server.report(job, "html"))
        import webbrowser

        webbrowser.open(path.as_uri())
        sys.stdout.write(f"{path}\n")
        return 0
    data = server.report(args.id, "html" if args.html else "json")
    if args.html or args.json:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return 0
    from abliterate.contract.report import read_report
    from abliterate.report_text import report_text

    sys.stdout.write(report_text(read_report(data)) + "\n")
    return 0


def _saved(job: str, page: bytes) -> Path:
    """The page where a browser may read it: the job's own folder is the daemon's. Raises DiskError."""
    from pathlib import Path

    from platformdirs import user_cache_path

    from abliterate.contract.errors import DiskError

    path = Path(user_cache_path("abliterated")) / "reports" / f"{job}.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(page)
        temporary.replace(path)
    except OSError as error:
        raise DiskError(
            f"{path}: can't be written ({error.strerror})", remedy="Print the page with --html instead"
        ) from error
    return path
