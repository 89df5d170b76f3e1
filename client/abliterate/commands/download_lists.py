"""`abliterate download-lists`: fetches public prompt lists, after showing what they are and their licences."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from abliterate.render import json_text

if TYPE_CHECKING:
    from abliterate.lists import PromptList

_DESCRIPTION = """\
Fetch public lists of harmful and harmless prompts as text files, one prompt a line, for [prompts] in a recipe.
What each is and its licence is shown first, and nothing is fetched before a yes. The builtin prompts need none of
this. A download that breaks off goes on where it stopped when run again."""
_EPILOG = """\
examples:
  abliterate download-lists --list
  abliterate download-lists jbb-harmful jbb-benign --output-dir prompts
  abliterate download-lists --yes

then, in a recipe:
  [prompts]
  harmful = "prompts/jbb-harmful.txt"
  harmless = "prompts/jbb-benign.txt"

exit codes: 0 · 1 not wanted after all · 2 no such list · 4 no room · 75 the network failed"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument("lists", metavar="LIST", nargs="*", help="which; all of them if left out")
    parser.add_argument("--output-dir", metavar="DIR", default=".", help="where the files go; here if left out")
    parser.add_argument("--list", action="store_true", help="show what there is, and fetch nothing")
    parser.add_argument("--yes", action="store_true", help="the licences suit; don't ask")
    parser.add_argument("--json", action="store_true", help='print {"lists": [...]}, the files and what is in them')


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    from abliterate.contract.config import local_path
    from abliterate.contract.errors import RecipeError
    from abliterate.lists import fetch

    wanted = _wanted(args.lists)
    if args.list:
        sys.stdout.write(json_text({"lists": wanted}) + "\n" if args.json else _table(wanted))
        return 0
    sys.stderr.write(_table(wanted))
    if not args.yes:
        if not sys.stdin.isatty():
            raise RecipeError("nobody is here to say whether the licences suit", remedy="Say so with --yes")
        sys.stderr.write("Fetch them? [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            return 1
    folder, made = local_path(args.output_dir), []
    for one in wanted:
        path, count = fetch(one, folder)
        made.append({"name": one.name, "kind": one.kind, "licence": one.licence, "file": str(path), "prompts": count})
        if not args.json:
            sys.stdout.write(f"{path}  {count} {one.kind} prompts\n")
            sys.stdout.flush()
    if args.json:
        sys.stdout.write(json_text({"lists": made}) + "\n")
    return 0


def _wanted(names: list[str]) -> list[PromptList]:
    import difflib

    from abliterate.contract.errors import RecipeError
    from abliterate.lists import LISTS

    known = {one.name: one for one in LISTS}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}"
            raise RecipeError(f"{name}: no such list", remedy=hint)
    return [known[name] for name in dict.fromkeys(names)] or list(LISTS)


def _table(lists: list[PromptList]) -> str:
    rows = [("LIST", "KIND", "LICENCE", "WHAT"), *((one.name, one.kind, one.licence, one.about) for one in lists)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    ]
    lines[1:] = [f"{line}, {one.home}" for line, one in zip(lines[1:], lists, strict=True)]
    return "\n".join(lines) + "\n"
