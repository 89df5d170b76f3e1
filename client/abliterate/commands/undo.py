"""`abliterate undo`: removes a model of our making from the engine."""

from __future__ import annotations

import argparse
import sys

from abliterate.caretext import undone_text
from abliterate.contract.care import Undone, UndoRequest
from abliterate.render import json_text
from abliterate.settings import whereabouts

_DESCRIPTION = """\
Remove a model that abliterated made, and the copy a repair of it left, and say what space that
freed. Its base is never touched. A model made by others is refused, and so is a name the daemon
never gave (a copy made with `ollama cp`), unless --copy is said."""
_EPILOG = """\
examples:
  abliterate undo qwen3-abliterated:8b
  abliterate undo my-copy:latest --copy

exit codes: 0 removed; 6 not made here; 7 no such model."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument("model", metavar="NAME", help="the model to remove")
    parser.add_argument("--copy", action="store_true", help="also if the daemon never gave it that name")
    parser.add_argument("--json", action="store_true", help='print {"removed": [...], "freed": BYTES, ...}')


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    from abliterate.api import Daemon

    asked = UndoRequest(model=args.model, copy=args.copy)
    done = Daemon(whereabouts(args).socket, timeout=120).ask("POST", "/v1/undo", Undone, asked)
    sys.stdout.write((json_text(done) if args.json else undone_text(done)) + "\n")
    return 0
