"""`abliterate new`: a commented recipe, generated from the contract."""

from __future__ import annotations

import argparse
import sys

_DESCRIPTION = """\
Write a recipe to stdout: the model, and every other key commented out with its default, its choices and
what it is for."""
_EPILOG = """\
examples:
  abliterate new qwen3:8b > recipe.toml
  abliterate new hf:org/model
  abliterate new ./folder-with-safetensors
  abliterate check recipe.toml && abliterate submit recipe.toml"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default="qwen3:8b", help="as Ollama names it, hf:ORG/REPO, or a path"
    )


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    from abliterate.recipe_notes import commented_recipe
    from abliterate.wishes import model_reference

    sys.stdout.write(commented_recipe(model_reference(args.model)))
    return 0
