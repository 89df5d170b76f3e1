"""`abliterate models`: the models of our making in the engine, with what each was made from."""

from __future__ import annotations

import argparse
import sys

from abliterate.caretext import models_table
from abliterate.contract.care import Models
from abliterate.render import json_text
from abliterate.settings import whereabouts

_DESCRIPTION = """\
List the models made by abliterated that the engine has: what each was made from, its size, and
how often base and model refused when that was measured. Asked of the engine, so what somebody
copied or renamed is listed too."""
_EPILOG = """\
examples:
  abliterate models
  abliterate models --json | jq -r '.models[].name'"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument("--json", action="store_true", help='print {"models": [...], "others": N}')


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    from abliterate.api import Daemon

    found = Daemon(whereabouts(args).socket, timeout=120).ask("GET", "/v1/models", Models)
    if args.json:
        sys.stdout.write(json_text(found) + "\n")
    elif found.models:
        sys.stdout.write(models_table(found) + "\n")
    else:
        sys.stderr.write("None yet. Make one with `abliterate submit MODEL`, as in `abliterate submit qwen3:8b`.\n")
    return 0
