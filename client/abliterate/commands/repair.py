"""`abliterate repair`: a model gets back what its base has, by its manifest alone."""

from __future__ import annotations

import argparse
import sys

from abliterate.caretext import diagnosis_text, repaired_text
from abliterate.contract.care import Repaired, RepairRequest
from abliterate.render import colours, json_text
from abliterate.settings import whereabouts

_DESCRIPTION = """\
Give a model, whoever made it, the TEMPLATE, RENDERER, PARSER and parameters of the model it was
made from, and take away stop strings that cut tool calls off. No weight is read or written: it
takes an instant. What it was before is kept as NAME-before-repair, which costs no space."""
_EPILOG = """\
examples:
  abliterate repair somebody/qwen3-uncensored:8b                  from the base it looks made from
  abliterate repair somebody/qwen3-uncensored:8b --from qwen3:8b
  abliterate repair somebody/qwen3-uncensored:8b --back           as it was before

exit codes: 0 repaired, or nothing to repair; 1 a problem is left; 3 no base is known;
5 the engine made something else of it, so it is as it was; 6 the base is of another kind; 7 no such model."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument("model", metavar="MODEL", help="the model to repair")
    parser.add_argument("--from", dest="base", metavar="BASE", default="", help="take it from this model")
    parser.add_argument("--back", action="store_true", help="return to the copy from before the repair")
    parser.add_argument("--json", action="store_true", help='print {"model", "changed": [...], "backup", ...}')


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    from abliterate.api import Daemon

    asked = RepairRequest(model=args.model, base=args.base, back=args.back)
    done = Daemon(whereabouts(args).socket, timeout=3600).ask("POST", "/v1/repair", Repaired, asked)
    if args.json:
        sys.stdout.write(json_text(done) + "\n")
    else:
        sys.stdout.write(repaired_text(done) + "\n")
        if not done.diagnosis.healthy:
            sys.stderr.write(diagnosis_text(done.diagnosis, colour=colours(sys.stderr)) + "\n")
    return int(done.diagnosis.broken and not args.back)
