"""`abliterate drain`: stops the jobs at work and starts none, for an upgrade or a reboot."""

from __future__ import annotations

import argparse
import sys

from abliterate.render import json_text
from abliterate.settings import daemon

_DESCRIPTION = """\
Stop the jobs at work and start no further one until `abliterate resume`. Returns when no worker is left; the jobs
then go on at the stage they lost. Products that are handed to the engine now are not waited for: that goes on after
a restart as well."""
_EPILOG = """\
examples:
  abliterate drain && sudo reboot
  abliterate resume               afterwards"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument("--json", action="store_true", help='print {"paused": true}')


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    paused = daemon(args).drain()
    sys.stdout.write(json_text({"paused": paused}) + "\n" if args.json else "drained: nothing runs, nothing starts\n")
    return 0
