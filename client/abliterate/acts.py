"""What cancel, hold, release and retry share: ids in, views out. Does not know which states allow it."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from abliterate.contract.errors import AbliteratedError, DaemonUnavailable
from abliterate.render import clean, json_text, why
from abliterate.settings import daemon

if TYPE_CHECKING:
    from abliterate.api import Act
    from abliterate.contract.messages import JobView


def configure_act(parser: argparse.ArgumentParser, description: str, epilog: str) -> None:
    """The arguments of such a verb."""
    parser.description = description
    parser.epilog = epilog
    parser.add_argument("ids", metavar="ID", nargs="+", help="a job's id, or four or more characters of it")
    parser.add_argument("--json", action="store_true", help='print {"jobs": [...]}')


def run_act(args: argparse.Namespace, act: Act) -> int:
    """Do `act` to every job named, even if one of them refuses; the first refusal's exit code is the command's."""
    server = daemon(args)
    done: list[JobView] = []
    code = 0
    for job in args.ids:
        try:
            view = server.act(job, act)
        except DaemonUnavailable:
            raise
        except AbliteratedError as error:
            code = code or error.exit_code
            sys.stderr.write(f"abliterate: {clean(error.message)}\n")
            if error.remedy:
                sys.stderr.write(f"  → {clean(error.remedy)}\n")
            continue
        done.append(view)
        if not args.json:
            detail = why(view)
            sys.stdout.write(f"{view.id}  {view.state}{f'  {clean(detail)}' if detail else ''}\n")
    if args.json:
        sys.stdout.write(json_text({"jobs": done}) + "\n")
    return code
