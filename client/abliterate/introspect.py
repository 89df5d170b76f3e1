"""What the command line offers, read from its own parsers: for the completions and the reference. Pure."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from abliterate.cli import VERBS, build_parser


@dataclass(frozen=True)
class Option:
    """An option: its spellings, whether a value follows, what it is for."""

    names: tuple[str, ...]
    takes_value: bool
    is_file: bool
    help: str


@dataclass(frozen=True)
class Verb:
    """A verb: its summary, its options, and the names of its positional arguments."""

    name: str
    summary: str
    options: tuple[Option, ...]
    positionals: tuple[str, ...]
    choices: tuple[str, ...]
    help: str


def main_help() -> str:
    """`abliterate --help`."""
    return build_parser()[0].format_help()


def verbs() -> list[Verb]:
    """Every verb, its arguments loaded."""
    _, parsers = build_parser()
    return [_verb(name, parser.load()) for name, parser in parsers.items()]


def _verb(name: str, parser: argparse.ArgumentParser) -> Verb:
    options: list[Option] = []
    positionals: list[str] = []
    choices: list[str] = []
    for action in parser._actions:  # argparse shows its actions no other way
        if action.option_strings:
            takes = action.nargs != 0
            is_file = action.metavar in ("FILE", "PATH", "DIR")
            options.append(Option(tuple(action.option_strings), takes, is_file, (action.help or "").split(";")[0]))
        else:
            positionals.append(str(action.metavar or action.dest))
            choices += [str(choice) for choice in action.choices or ()]
    return Verb(name, VERBS[name], tuple(options), tuple(positionals), tuple(choices), parser.format_help())
