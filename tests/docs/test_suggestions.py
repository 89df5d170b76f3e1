"""Every command our own words tell people to type exists, with the options that are named."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from abliterate.introspect import verbs as client_verbs
from abliterated.cli import parser as daemon_parser

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "client").rglob("*.py"), *(ROOT / "daemon").rglob("*.py")])
COMMAND = re.compile(r"(?:`|^ {2,})(abliterated?) ([a-z][a-z-]*)((?: [^`\n]*)?)", re.M)


def options_by_verb() -> dict[str, dict[str, set[str]]]:
    [found] = [action for action in daemon_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    ours = {verb.name: {name for option in verb.options for name in option.names} for verb in client_verbs()}
    return {
        "abliterate": ours,
        "abliterated": {verb: set(parser._option_string_actions) for verb, parser in found.choices.items()},
    }


KNOWN = options_by_verb()


def said(path: Path) -> Iterator[str]:
    """The texts in a module; what an f-string fills in is X."""
    tree = ast.parse(path.read_text())
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


@pytest.mark.parametrize("path", [path for path in SOURCES if "abliterate" in path.read_text()], ids=lambda p: p.stem)
def test_what_we_tell_people_to_type_exists(path: Path) -> None:
    for text in said(path):
        for command, verb, rest in COMMAND.findall(text):
            assert verb in KNOWN[command], f"{command} {verb}"
            for option in re.findall(r"(?<![\w-])(--[a-z][a-z-]*|-[a-z])\b", rest.partition("#")[0].partition("|")[0]):
                assert option in KNOWN[command][verb], f"{command} {verb} {option}"


def test_the_search_finds_what_is_there() -> None:
    found = [command for path in SOURCES for text in said(path) for command in COMMAND.findall(text)]
    assert len(found) > 100
    assert {command for command, _, _ in found} == set(KNOWN)
