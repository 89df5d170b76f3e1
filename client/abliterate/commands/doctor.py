"""`abliterate doctor`: what is wrong with a model, or with this installation."""

from __future__ import annotations

import argparse
import sys

from abliterate.caretext import diagnosis_text
from abliterate.contract.care import Diagnosis, DoctorRequest, Finding
from abliterate.contract.errors import DaemonUnavailable
from abliterate.render import colours, json_text
from abliterate.settings import whereabouts

_DESCRIPTION = """\
Say what is wrong with a model in the engine, whoever made it: a lost or dummy template, a lost
RENDERER or PARSER, stop strings that cut tool calls off, capabilities it claims and can't keep.
It is held against the model it was probably made from, where the engine has that. Nothing is
changed. Without MODEL: the daemon, the engine and its version, its store, disk, configuration."""
_EPILOG = """\
examples:
  abliterate doctor                                  this installation
  abliterate doctor somebody/qwen3-uncensored:8b     any model
  abliterate doctor qwen3-abliterated:8b --deep      the engine renders conversations; may load it

exit codes: 0 nothing wrong, or warnings; 1 a problem; 7 no such model; 69 no daemon."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument("model", metavar="MODEL", nargs="?", default="", help="a model in the engine")
    parser.add_argument("--from", dest="base", metavar="BASE", default="", help="the model to hold it against")
    parser.add_argument("--deep", action="store_true", help="let the engine render conversations; may load the model")
    parser.add_argument("--json", action="store_true", help='print {"model", "findings": [...], ...}')


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    from abliterate.api import Daemon

    asked = DoctorRequest(model=args.model, base=args.base, deep=args.deep)
    code = 0
    try:
        found = Daemon(whereabouts(args).socket, timeout=600).ask("POST", "/v1/doctor", Diagnosis, asked)
    except DaemonUnavailable as error:
        if args.model:
            raise
        down = Finding(key="daemon", level="problem", text=error.message, remedy=error.remedy)
        found, code = Diagnosis(findings=[down]), error.exit_code
    sys.stdout.write((json_text(found) if args.json else diagnosis_text(found, colour=colours(sys.stdout))) + "\n")
    return code or int(found.broken)
