"""`abliterate pause`: starts no further job."""

from __future__ import annotations

import argparse
import sys

from abliterate.render import json_text
from abliterate.settings import daemon

_DESCRIPTION = """\
Start no further job until `abliterate resume`. A running job goes on; submitting still works."""
_EPILOG = """\
examples:
  abliterate pause"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument("--json", action="store_true", help='print {"paused": true}')


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    paused = daemon(args).set_paused(True)
    sys.stdout.write(json_text({"paused": paused}) + "\n" if args.json else "paused: no further job starts\n")
    return 0
