"""`abliterate import-config`: turns a configuration of ollama-forge into a recipe on stdout."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from abliterate.contract.errors import NotFound, RecipeError
from abliterate.render import clean

_DESCRIPTION = """\
Write the recipe that an ollama-forge configuration (YAML or JSON) stands for to stdout. Every key has its place,
or a comment that says why it has none; a key that is neither's is an error. Paths are made absolute from here."""
_EPILOG = """\
examples:
  abliterate import-config forge.yaml > recipe.toml
  abliterate import-config forge.json | abliterate submit -

YAML needs PyYAML, which comes with `pip install 'abliterated[pipeline]'`; JSON needs nothing.

exit codes: 0 · 2 a key or a value is wrong · 7 no such file"""
_LONGEST = 1 << 20


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument("file", metavar="FILE", help="a .yaml, .yml or .json file, or - for stdin")


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    from abliterate.forge import import_forge

    source = "stdin" if args.file == "-" else args.file
    text, comments = import_forge(_table(_read(args.file), source), source)
    sys.stdout.write(text)
    sys.stdout.flush()
    for comment in comments:
        sys.stderr.write(f"abliterate: {clean(comment)}\n")
    return 0


def _read(name: str) -> str:
    from abliterate.contract.config import local_path

    try:
        if name == "-":
            data = sys.stdin.buffer.read(_LONGEST + 1)
        else:
            with local_path(name).open("rb") as file:
                data = file.read(_LONGEST + 1)
        if len(data) > _LONGEST:
            raise RecipeError(f"{name}: too long for a configuration", remedy="Name ollama-forge's configuration")
        return data.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise NotFound(f"{name}: no such file", remedy="Name ollama-forge's --config file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{name}: can't be read ({error})", remedy="Name a YAML or JSON file in UTF-8") from error


def _table(text: str, source: str) -> dict[str, Any]:
    """JSON, which is YAML too; where it isn't JSON, YAML, in which no tag makes anything but plain values."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise RecipeError(f"{source}: nested too deep", remedy="A configuration is flat: key: value") from error
    except ValueError as error:
        if source.endswith(".json"):
            raise RecipeError(f"{source}: not readable as JSON ({error})", remedy="Correct it there") from error
        value = _yaml(text, source)
    if not isinstance(value, dict):
        raise RecipeError(f"{source}: no configuration", remedy="A configuration is flat: key: value")
    return value


def _yaml(text: str, source: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise RecipeError(
            f"{source}: PyYAML is not installed, and this is no JSON",
            remedy="pip install 'abliterated[pipeline]', or give the configuration as JSON",
        ) from error
    # An alias of an alias of an alias is how eight lines become gigabytes; a flat table needs none.
    if "*" in text and any(isinstance(token, yaml.AliasToken) for token in _tokens(yaml, text, source)):
        raise RecipeError(f"{source}: aliases are not read", remedy="Write the value where the * stands")
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"{source}: not readable as YAML ({_place(error)})", remedy="Correct it there") from error


def _tokens(yaml: Any, text: str, source: str) -> list[Any]:
    try:
        return list(yaml.scan(text))
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not readable as YAML ({_place(error)})", remedy="Correct it there") from error


def _place(error: BaseException) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}: " if mark is not None else ""
    return where + str(getattr(error, "problem", None) or error).split("\n")[0]
