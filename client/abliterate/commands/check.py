"""`abliterate check`: validates recipes, touching nothing but the recipes themselves."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from abliterate.contract.errors import AbliteratedError
from abliterate.render import clean, json_text

if TYPE_CHECKING:
    from collections.abc import Iterator

_DESCRIPTION = """\
Validate recipes: every problem at once, with line, key and remedy. Nothing but the recipe is read, and
nobody is asked: whether the model exists, the job finds out."""
_EPILOG = """\
examples:
  abliterate check recipe.toml
  abliterate check recipes/*.toml
  abliterate new qwen3:8b | abliterate check -

exit codes: 0 all are valid · 2 one is not · 7 no such file"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument("recipes", metavar="RECIPE", nargs="+", help="a recipe's file, or - for stdin")
    parser.add_argument("--json", action="store_true", help='print {"recipes": [{"recipe", "valid", ...}]}')


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    verdicts = list(_verdicts(args.recipes))
    if args.json:
        sys.stdout.write(json_text({"recipes": [verdict for verdict, _ in verdicts]}) + "\n")
    else:
        for verdict, error in verdicts:
            _say(verdict, error)
    return next((error.exit_code for _, error in verdicts if error is not None), 0)


def _verdicts(recipes: list[str]) -> Iterator[tuple[dict[str, Any], AbliteratedError | None]]:
    from abliterate.contract.recipe import parse_recipe, target_name
    from abliterate.wishes import read_recipe

    for asked in recipes:
        try:
            recipe = parse_recipe(read_recipe(asked), "stdin" if asked == "-" else asked)
        except AbliteratedError as error:
            yield {"recipe": asked, "valid": False, "problems": error.message.split("\n")}, error
        else:
            yield {"recipe": asked, "valid": True, "model": recipe.model, "target": target_name(recipe).short()}, None


def _say(verdict: dict[str, Any], error: AbliteratedError | None) -> None:
    if error is None:
        sys.stdout.write(clean(f"{verdict['recipe']}: valid: {verdict['model']} → {verdict['target']}") + "\n")
        sys.stdout.flush()
        return
    for line in error.message.split("\n"):
        sys.stderr.write(f"abliterate: {clean(line)}\n")
    if error.remedy:
        sys.stderr.write(f"  → {clean(error.remedy)}\n")
