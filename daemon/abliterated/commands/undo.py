"""`abliterated undo`: a model of our making removed, without the daemon."""

from __future__ import annotations

import argparse
import asyncio
import sys

from abliterate.caretext import undone_text
from abliterate.contract.care import UndoRequest
from abliterate.render import json_text
from abliterated.foreground import add_whereabouts, care

HELP = "remove a model made here from an engine, and say what space that freed"
EXAMPLES = """\
examples:
  abliterated undo qwen3-abliterated:8b

No journal is asked: whatever holds weights of our making counts as ours, copies too.
exit codes: 0 removed; 6 not made here; 7 no such model; 75 no engine answers."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="NAME", help="the model to remove")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    add_whereabouts(parser)


def run(options: argparse.Namespace) -> int:
    done = asyncio.run(care(options).undo(UndoRequest(model=options.model)))
    sys.stdout.write((json_text(done) if options.json else undone_text(done)) + "\n")
    return 0
