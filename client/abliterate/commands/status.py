"""`abliterate status`: the queue as a table, or one job in detail; once or as it changes."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from abliterate.render import colours, job_details, job_table, json_text, summary, terminal_width
from abliterate.settings import daemon

if TYPE_CHECKING:
    from abliterate.api import Daemon

_DESCRIPTION = """\
Show every job that isn't cleaned away yet, ended ones too: what it makes, how far it is, and the
reason why it waits. With an ID: all about one job."""
_EPILOG = """\
examples:
  abliterate status
  abliterate status 4kz9                    one job: progress, result, what went wrong
  abliterate status --watch                 redrawn as it changes; Ctrl-C leaves
  abliterate status 4kz9 --watch            followed to its end
  abliterate status --json | jq -r '.jobs[] | select(.state == "failed") | .id'

exit codes: 0; with ID and --watch those of `abliterate wait`; 69 if the daemon does not answer."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument("id", metavar="ID", nargs="?", help="a job's id, or four or more characters of it")
    parser.add_argument("--watch", action="store_true", help="keep showing it as it changes")
    parser.add_argument(
        "--json", action="store_true", help='print {"jobs": [...], "version", "paused", "engine", "proxy", ...}'
    )


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    server = daemon(args)
    if args.watch and not args.json:
        return _watch(server, args.id)
    if args.id:
        job = server.job(args.id)
        sys.stdout.write((json_text(job) if args.json else job_details(job)) + "\n")
        return 0
    status = server.status()
    if args.json:
        sys.stdout.write(json_text(status) + "\n")
        return 0
    if status.jobs:
        table = job_table(status.jobs, width=terminal_width(sys.stdout), colour=colours(sys.stdout))
        sys.stdout.write(table + "\n")
        sys.stdout.flush()
    else:
        sys.stderr.write("No jobs. Queue one with `abliterate submit MODEL`, as in `abliterate submit qwen3:8b`.\n")
    sys.stderr.write(summary(status) + "\n")
    return 0


def _watch(server: Daemon, job: str | None) -> int:
    from abliterate.follow import Feed, exit_code
    from abliterate.live import watch_job, watch_queue

    if job is None:
        server.status()  # an absent daemon is an error now, not something to wait for
        with Feed(server, None) as feed:
            watch_queue(feed, server.status, sys.stdout)
    view = server.job(job or "")
    with Feed(server, [view.id]) as feed:
        return exit_code([watch_job(feed, view.id, sys.stdout)])
