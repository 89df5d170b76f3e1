"""Turns a plain table into frozen structs, collecting *every* problem with its dotted key, line and remedy.

Knows msgspec structs; does not know which ones (recipe and configuration both use it).
"""

from __future__ import annotations

import difflib
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, TypeVar

import msgspec

from abliterate.contract.errors import RecipeError
from abliterate.contract.toml_source import KeyLines

T = TypeVar("T", bound=msgspec.Struct)

# Every problem at once, but a stranger's file must not make us write a book.
MAX_PROBLEMS = 50

# Read once a kind: looking a struct's annotations up takes longer than converting one.
_fields = lru_cache(maxsize=64)(msgspec.structs.fields)

_AT_PATH = re.compile(r" - at `\$[^`]*`$")
# What msgspec says, in the words of who writes a file by hand.
_TYPES: Final = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false",
                 "array": "a list", "object": "a table"}  # fmt: skip
_BOUNDS: Final = {" of length <= ": " no longer than ", " of length >= ": " no shorter than ", " >= ": " of at least ",
                  " <= ": " of at most ", " > ": " above ", " < ": " below "}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """One thing wrong: the dotted key, what is wrong, what to do."""

    key: str
    message: str
    remedy: str = ""


def build(
    kind: type[T], table: Mapping[str, Any], prefix: str = "", root: type[msgspec.Struct] | None = None
) -> tuple[T | None, list[Problem]]:
    """Convert `table` to `kind`; returns the struct, or None and all problems found. `root`: what it is a part of."""
    root = root or kind
    fields = {field.encode_name: field for field in _fields(kind)}
    problems: list[Problem] = []
    values: dict[str, Any] = {}
    for key, raw in table.items():
        path = f"{prefix}{key}"
        field = fields.get(key)
        if field is None:
            hint = _did_you_mean(key, list(fields), prefix, root) if len(problems) < MAX_PROBLEMS else ""
            problems.append(Problem(path, "unknown key", hint))
            continue
        value, found = _convert(field.type, raw, path, root)
        problems += found
        if not found:
            values[field.name] = value
    for name, field in fields.items():
        if name not in table and field.required:
            problems.append(Problem(f"{prefix}{name}", "missing", f"Add `{name} = …`"))
    return (None, problems) if problems else (kind(**values), [])


def replaced(whole: T, path: str, raw: Any, prefix: str = "") -> tuple[T, list[Problem]]:
    """`whole` with the value at the dotted `path` instead; only that value is converted."""
    head, _, rest = path.partition(".")
    field = next((field for field in _fields(type(whole)) if field.encode_name == head), None)
    inner: Any = getattr(whole, field.name) if field is not None else None
    if field is None or (rest and not isinstance(inner, msgspec.Struct)):
        return whole, [Problem(f"{prefix}{path}", "no such key", "`abliterate new` shows every key")]
    if rest:
        value, found = replaced(inner, rest, raw, f"{prefix}{head}.")
    else:
        value, found = _convert(field.type, raw, f"{prefix}{head}", type(whole))
    return (whole, found) if found else (msgspec.structs.replace(whole, **{field.name: value}), [])


def raise_problems(source: str, text: str, problems: list[Problem]) -> None:
    """Raise one RecipeError that names every problem with its line; does nothing when there is none."""
    if not problems:
        return
    keys = KeyLines(text)
    lines = []
    placed = [(keys.of(problem.key), problem) for problem in problems[:MAX_PROBLEMS]]
    for line, problem in sorted(placed, key=lambda one: one[0] or sys.maxsize):
        where = f"{source}, line {line}" if line else source
        lines.append(f"{where}: {problem.key}: {problem.message}" + (f" ({problem.remedy})" if problem.remedy else ""))
    if len(problems) > MAX_PROBLEMS:
        lines.append(f"{source}: and {len(problems) - MAX_PROBLEMS} more")
    raise RecipeError("\n".join(lines), remedy="Correct it and try again")


def _convert(kind: Any, raw: Any, path: str, root: type[msgspec.Struct]) -> tuple[Any, list[Problem]]:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        if not isinstance(raw, dict):
            return None, [Problem(path, "must be a table", f"Write `[{path}]` above its keys")]
        return build(kind, raw, prefix=f"{path}.", root=root)
    if bad := _not_a_number(raw):
        return None, [Problem(path, bad, "Give a finite number")]
    try:
        return msgspec.convert(raw, kind, strict=True), []
    except msgspec.ValidationError as error:
        return None, [Problem(path, _in_words(_AT_PATH.sub("", str(error)), raw), _allowed(kind, raw))]


def _in_words(message: str, raw: Any) -> str:
    """A complaint of msgspec's about `raw` as a person would say it."""
    if "matching regex" in message:
        return f"{raw!r:.60} is not understood"
    message = re.sub(r"^Invalid enum value (.*)$", r"\1 is none of its values", message)
    message = re.sub(r"`([\w |]+)`", lambda found: _either(found[1].split(" | ")), message)
    for sign, words in _BOUNDS.items():
        message = message.replace(sign, words)
    if isinstance(raw, int | float) and not isinstance(raw, bool):
        message = re.sub(r"got a .*number$", f"got {raw}", message)
    return re.sub(r"\.0$", "", message[:1].lower() + message[1:])


def _either(names: list[str]) -> str:
    kept = [name for name in names if not (name == "int" and "float" in names)]
    return " or ".join(_TYPES.get(name, f"`{name}`") for name in kept)


def _not_a_number(raw: Any) -> str:
    values = raw if isinstance(raw, list) else [raw]
    return "not a finite number" if any(isinstance(v, float) and not math.isfinite(v) for v in values) else ""


def _allowed(kind: Any, raw: Any) -> str:
    if told := [meta.description for meta in getattr(kind, "__metadata__", ()) if meta.description]:
        return str(told[0])
    arguments = getattr(kind, "__args__", ())
    inner = [choice for argument in arguments for choice in getattr(argument, "__args__", ())]
    choices = [choice for choice in (*arguments, *inner) if isinstance(choice, str)]
    if not choices:
        return _quotes(kind, raw)
    close = difflib.get_close_matches(str(raw), choices, n=1)
    choices += ["a number"] if float in arguments else []
    return f"did you mean {close[0]!r}?" if close else "one of " + ", ".join(choices)


def _quotes(kind: Any, raw: Any) -> str:
    """For a number or a switch that was written as a text, and the other way round."""
    try:
        if isinstance(raw, str) and _fits([raw], kind):
            return f"in brackets: [{json.dumps(raw, ensure_ascii=False)}]"
        if isinstance(raw, str):
            msgspec.convert(text := raw.strip().lower(), kind, strict=False)
            return f"without quotes: {text}"
        if isinstance(raw, int) and not isinstance(raw, bool):
            msgspec.convert(str(raw), kind)
            return f'in quotes: "{raw}"'
    except msgspec.ValidationError:
        pass
    return ""


def _fits(value: Any, kind: Any) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


def _did_you_mean(key: str, known: list[str], prefix: str, root: type[msgspec.Struct]) -> str:
    """The nearest key of this table; else the table in which a key of that name stands."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    elsewhere = "" if close else _elsewhere(key, prefix, root)
    close = close or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if elsewhere or close:
        return f"did you mean `{elsewhere or close[0]}`?"
    return "known here: " + ", ".join(known)


def _elsewhere(key: str, prefix: str, root: type[msgspec.Struct]) -> str:
    tables: dict[str, type[msgspec.Struct]] = {"": root}
    for field in _fields(root):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            tables[f"{field.encode_name}."] = field.type
    found = [
        f"{table}{field.encode_name}"
        for table, kind in tables.items()
        for field in _fields(kind)
        if table != prefix and field.encode_name == key
    ]
    return found[0] if found else ""
