"""`abliterated doctor`: a model's or the installation's diagnosis, without the daemon."""

from __future__ import annotations

import argparse
import asyncio
import sys

from abliterate.caretext import diagnosis_text
from abliterate.contract.care import DoctorRequest
from abliterate.render import colours, json_text
from abliterated.foreground import add_whereabouts, care

HELP = "say what is wrong with a model in an engine, or with this installation"
EXAMPLES = """\
examples:
  abliterated doctor
  abliterated doctor somebody/qwen3-uncensored:8b --from qwen3:8b
  abliterated doctor qwen3:8b --url http://127.0.0.1:11434 --deep

exit codes: 0 nothing wrong, or warnings; 1 a problem; 7 no such model; 75 no engine answers."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", default="", help="a model in the engine")
    parser.add_argument("--from", dest="base", metavar="BASE", default="", help="the model to hold it against")
    parser.add_argument("--deep", action="store_true", help="let the engine render conversations; may load the model")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    add_whereabouts(parser)


def run(options: argparse.Namespace) -> int:
    asked = DoctorRequest(model=options.model, base=options.base, deep=options.deep)
    found = asyncio.run(care(options).doctor(asked))
    sys.stdout.write((json_text(found) if options.json else diagnosis_text(found, colour=colours(sys.stdout))) + "\n")
    return int(found.broken)
