"""`abliterated repair`: a model put right by its manifest, without the daemon."""

from __future__ import annotations

import argparse
import asyncio
import sys

from abliterate.caretext import diagnosis_text, repaired_text
from abliterate.contract.care import RepairRequest
from abliterate.render import colours, json_text
from abliterated.foreground import add_whereabouts, care

HELP = "give a model in an engine back what its base has, or undo that"
EXAMPLES = """\
examples:
  abliterated repair somebody/qwen3-uncensored:8b --from qwen3:8b
  abliterated repair somebody/qwen3-uncensored:8b --back

exit codes: 0 repaired, or nothing to repair; 1 a problem is left; 3 no base is known; 5 refused;
6 the base is of another kind; 7 no such model; 75 no engine answers."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the model to repair")
    parser.add_argument("--from", dest="base", metavar="BASE", default="", help="take it from this model")
    parser.add_argument("--back", action="store_true", help="return to the copy from before the repair")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    add_whereabouts(parser)


def run(options: argparse.Namespace) -> int:
    asked = RepairRequest(model=options.model, base=options.base, back=options.back)
    done = asyncio.run(care(options).repair(asked))
    if options.json:
        sys.stdout.write(json_text(done) + "\n")
    else:
        sys.stdout.write(repaired_text(done) + "\n")
        if not done.diagnosis.healthy:
            sys.stderr.write(diagnosis_text(done.diagnosis, colour=colours(sys.stderr)) + "\n")
    return int(done.diagnosis.broken and not options.back)
