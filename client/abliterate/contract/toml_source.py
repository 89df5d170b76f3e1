"""Reads TOML that a stranger wrote, and says on which line a key stands.

A recipe is hostile until proven: size and the dots of a line are limited *before* the parser sees the text, because
unpatched `tomllib` needs gigabytes for one long dotted key. Knows TOML's lines; does not know recipes.
"""

from __future__ import annotations

import datetime
import re
import tomllib
from typing import Any

from abliterate.contract.errors import RecipeError

MAX_BYTES = 64 * 1024
# Dots are counted wherever they stand: whatever a quote hides, no key can have more parts. 200 parts cost nothing.
MAX_DOTS = 200

_DEEPEST = 8  # parts of a key; a recipe has two

_HEADER = re.compile(r"^\s*\[\[?\s*([^\]#]+?)\s*\]\]?")
_KEY = re.compile(r"""^\s*((?:"[^"]*"|'[^']*'|[A-Za-z0-9_-]+)(?:\s*\.\s*(?:"[^"]*"|'[^']*'|[A-Za-z0-9_-]+))*)\s*=""")
_LINE_IN_MESSAGE = re.compile(r"\(at line (\d+), column \d+\)|\(at end of document\)")


def parse_toml(data: bytes, source: str) -> tuple[dict[str, Any], str]:
    """Parse `data`; returns the table (local date-times as ISO text) and the decoded text.

    Raises RecipeError, with the line where one is known; never anything else.
    """
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{source}: {len(data)} bytes are too many", remedy=f"Keep it under {MAX_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError(f"{source}, line {line}: not UTF-8", remedy="Save the file as UTF-8") from error
    for number, row in enumerate(text.split("\n"), 1):
        if row.count(".") > MAX_DOTS:
            raise RecipeError(f"{source}, line {number}: more than {MAX_DOTS} dots on a line", remedy="Shorten it")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(_decode_message(source, str(error), text), remedy="Correct the TOML there") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{source}: not readable as TOML ({error})", remedy="Simplify it") from error
    return {key: _plain(value) for key, value in table.items()}, text


class KeyLines:
    """Where each key and table of a TOML text is first set; read once, however many are asked for."""

    def __init__(self, text: str) -> None:
        self._lines: dict[tuple[str, ...], int] = {}
        table: list[str] = []
        inside = ""  # the quotes of a multi-line string that is open
        for number, line in enumerate(text.split("\n"), 1):
            if inside:
                inside = "" if inside in line else inside
                continue
            if header := _HEADER.match(line):
                table = here = _parts(header.group(1))
            elif key := _KEY.match(line):
                here = table + _parts(key.group(1))
                inside = next((quotes for quotes in ("'''", '"""') if line.count(quotes) == 1), "")
            else:
                continue
            if len(here) <= _DEEPEST:
                self._lines.setdefault(tuple(here), number)

    def of(self, path: str) -> int | None:
        """The 1-based line where the dotted `path`, or else the table around it, is set."""
        wanted = path.split(".", _DEEPEST)[:_DEEPEST]
        for depth in range(len(wanted), 0, -1):
            if line := self._lines.get(tuple(wanted[:depth])):
                return line
        return None


def line_of(text: str, path: str) -> int | None:
    """The 1-based line where the dotted `path` (or its table) is set in `text`, if it can be found."""
    return KeyLines(text).of(path)


def _parts(dotted: str) -> list[str]:
    return [part.strip().strip("\"'") for part in dotted.split(".")]


def _decode_message(source: str, message: str, text: str) -> str:
    found = _LINE_IN_MESSAGE.search(message)
    last = text.rstrip().count("\n") + 1
    where = f", line {found.group(1) or last}" if found else ""
    return f"{source}{where}: {_LINE_IN_MESSAGE.sub('', message).strip()}"


def _plain(value: Any) -> Any:
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value
