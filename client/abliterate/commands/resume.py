"""`abliterate resume`: starts jobs again."""

from __future__ import annotations

import argparse
import sys

from abliterate.render import json_text
from abliterate.settings import daemon

_DESCRIPTION = """\
Start jobs again after `abliterate pause`."""
_EPILOG = """\
examples:
  abliterate resume"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument("--json", action="store_true", help='print {"paused": false}')


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    paused = daemon(args).set_paused(False)
    sys.stdout.write(json_text({"paused": paused}) + "\n" if args.json else "resumed: jobs start again\n")
    return 0
