"""`abliterate report`: what a job did to its model, as a summary, as JSON, or as a page in the browser."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from abliterate.contract.errors import NotFound
from abliterate.settings import daemon

if TYPE_CHECKING:
    from pathlib import Path

    from abliterate.api import Daemon

_DESCRIPTION = """\
Show what a job did to its model: refusals before and after, how close it stayed to the original, what
was edited, what it cost. The page shows it with pictures; it is one file and needs no network."""
_EPILOG = """\
examples:
  abliterate report 4kz9                    a summary
  abliterate report qwen3-abliterated:8b    the same, of the job that made it
  abliterate report 4kz9 --open             the page, in a browser
  abliterate report 4kz9 --html > r.html    the page, wherever you want it
  abliterate report 4kz9 --json | jq .evaluation

exit codes: 0; 7 no such job, or it has no report; 69 the daemon does not answer."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument(
        "id", metavar="ID|MODEL", help="a job's id, or four or more characters of it; or the model it made"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--html", action="store_true", help="print the page")
    how.add_argument("--json", action="store_true", help="print report.json")
    how.add_argument("--open", action="store_true", help="open the page in a browser, and print where it lies")


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    server = daemon(args)
    job = _job(server, args.id)
    if args.open:
        path = _saved(job, server.report(job, "html"))
        import webbrowser

        webbrowser.open(path.as_uri())
        sys.stdout.write(f"{path}\n")
        return 0
    data = server.report(job, "html" if args.html else "json")
    if args.html or args.json:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return 0
    from abliterate.contract.report import read_report
    from abliterate.report_text import report_text

    sys.stdout.write(report_text(read_report(data)) + "\n")
    return 0


def _job(server: Daemon, asked: str) -> str:
    """The job of that id, or the last that made that model. Raises NotFound."""
    try:
        return server.job(asked).id
    except NotFound:
        wanted = asked.removesuffix(":latest")
        made = [job for job in server.jobs() if job.target.removesuffix(":latest") == wanted and job.result]
        if not made:
            raise
        return max(made, key=lambda job: job.ended or 0).id


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
