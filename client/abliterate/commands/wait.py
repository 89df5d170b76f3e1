"""`abliterate wait`: returns when jobs have ended."""

from __future__ import annotations

import argparse
import re
import sys
import time

from abliterate.render import clean, json_text
from abliterate.settings import daemon

_DESCRIPTION = """\
Wait until every job named has ended, then print how, one job a line. A restart of the daemon meanwhile
is waited for too; a held job is waited for until somebody releases it."""
_EPILOG = """\
examples:
  abliterate wait 4kz9 && ollama run qwen3-abliterated:8b
  abliterate wait 4kz9 7qm2 --timeout 2h
  abliterate wait "$(abliterate submit recipe.toml)"

exit codes:
  0    every job succeeded
  1    a job failed                    (of several outcomes, the first in this order counts)
  2    a job's recipe was rejected
  86   a job was cancelled
  8    all are done, but one's model refuses more than its search.refusal_target allows
  124  --timeout passed before all had ended
  7    no such job
  69   the daemon does not answer, or stopped answering for a minute
  130  interrupted; the jobs go on"""
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument("ids", metavar="ID", nargs="+", help="a job's id, or four or more characters of it")
    parser.add_argument("--timeout", metavar="TIME", type=span, help="give up after 90, 90s, 10m, 2h or 1d")
    parser.add_argument("--json", action="store_true", help='print {"jobs": [...]}')


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    from abliterate.follow import TIMED_OUT, Feed, exit_code, wait
    from abliterate.live import closing_line

    deadline = None if args.timeout is None else time.monotonic() + args.timeout
    server = daemon(args)
    known = {job.id: job for job in map(server.job, args.ids)}
    ids = list(known)
    with Feed(server, ids) as feed:
        ended = wait(feed, list(known.values()), deadline)
    views = [ended[job] for job in ids if job in ended]
    if args.json:
        sys.stdout.write(json_text({"jobs": views}) + "\n")
    else:
        sys.stdout.write("".join(f"{view.id}  {closing_line(view)}\n" for view in views))
    if missing := [job for job in ids if job not in ended]:
        sys.stderr.write(f"abliterate: not ended in time: {clean(', '.join(missing))}\n  → They go on\n")
        return TIMED_OUT
    return exit_code(views)


def span(text: str) -> float:
    """A time as people type it, in seconds."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([smhd]?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: write 90s, 10m, 2h or 1d")
    return float(found.group(1)) * _UNITS[found.group(2)]
