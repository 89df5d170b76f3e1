"""`abliterate clean`: forgets jobs that ended long ago, and removes what they left."""

from __future__ import annotations

import argparse
import sys

from abliterate.render import json_text
from abliterate.settings import daemon

_DESCRIPTION = """\
Forget the jobs that ended long ago: their recipes, logs and reports, and what was rejected then. The daemon does it
once a day by itself (`jobs.keep_days`). The models they made stay in the engine."""
_EPILOG = """\
examples:
  abliterate clean
  abliterate clean --days 0       every job that has ended"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument("--days", type=float, metavar="N", help="ended at least so long ago (default: jobs.keep_days)")
    parser.add_argument("--json", action="store_true", help='print {"jobs": ..., "bytes": ...}')


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    done = daemon(args).clean(args.days)
    if args.json:
        sys.stdout.write(json_text(done) + "\n")
    else:
        jobs = "1 job" if done.jobs == 1 else f"{done.jobs} jobs"
        sys.stdout.write(f"forgot {jobs}, freed {done.bytes / 1e6:.1f} MB\n")
    return 0
