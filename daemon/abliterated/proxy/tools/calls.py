"""Reading a call once its end has come, and telling early of what it can't become. Pure.

`begins_…` must never give up on what `parse_…` accepts.
Does not know: streaming, APIs, whether a named tool exists beyond the names it is given.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any, Final

Calls = list[tuple[str, dict[str, Any]]]
Names = frozenset[str]

_SPACE: Final = " \t\r\n"
_NAME_KEYS: Final = ("name", "tool_name")
_ARGUMENT_KEYS: Final = ("arguments", "parameters")
_OTHER_KEYS: Final = frozenset({"id", "type", "tool_call_id", "index", "function"})


def ends_in_a_string(text: str) -> bool:
    """JSON that stops within a string: a mark there is part of it."""
    inside = escaped = False
    for char in text:
        if escaped:
            escaped = False
        elif inside and char == "\\":
            escaped = True
        elif char == '"':
            inside = not inside
    return inside


# JSON


def _one(value: Any, names: Names) -> tuple[str, dict[str, Any]] | None:
    """A call as an object; None for any other object."""
    if not isinstance(value, dict):
        return None
    inner = value.get("function")
    if isinstance(inner, dict):
        value = inner
    fallback = inner if isinstance(inner, str) else None
    name = next((value[key] for key in _NAME_KEYS if isinstance(value.get(key), str)), fallback)
    if name not in names or set(value) - {*_NAME_KEYS, *_ARGUMENT_KEYS} - _OTHER_KEYS:
        return None
    arguments: Any = next((value[key] for key in _ARGUMENT_KEYS if key in value), {})
    if isinstance(arguments, str):
        arguments = _json(arguments)
    if arguments is None:
        arguments = {}
    return (name, arguments) if isinstance(arguments, dict) else None


def _json(text: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return ...


def parse_json(text: str, names: Names) -> Calls | None:
    """One object, a list of them, or several side by side."""
    decoder, found, place = json.JSONDecoder(strict=False), [], 0
    text = text.strip(_SPACE)
    while place < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return None
        for one in value if isinstance(value, list) else [value]:
            call = _one(one, names)
            if call is None:
                return None
            found.append(call)
        while place < len(text) and text[place] in " \t\r\n,;":
            place += 1
    return found or None


_NAME_FIRST: Final = re.compile(r'[\[\s]*\{\s*"(?:name|tool_name)"\s*:\s*"([^"\\]*)"')


def begins_json(text: str, names: Names) -> bool | None:
    """An object (or a list of them) and, where its name comes first, one of a tool there is."""
    found = _NAME_FIRST.match(text)
    if found:
        return found[1] in names
    rest = text.lstrip(_SPACE)
    if rest.startswith("["):
        rest = rest[1:].lstrip(_SPACE)
    if not rest:
        return None
    if rest[0] != "{":
        return False
    key = rest[1:].lstrip(_SPACE)
    if not key:
        return None
    if key[0] != '"':
        return False
    end = key.find('"', 1)
    if end < 0:
        return None if len(key) < 32 else False
    if key[1:end] not in {*_NAME_KEYS, *_ARGUMENT_KEYS, *_OTHER_KEYS}:
        return False
    if key[1:end] not in _NAME_KEYS:
        return True  # its name comes later
    value = key[end + 1 :].lstrip(_SPACE)
    if value[:1] not in ("", ":"):
        return False
    value = value[1:].lstrip(_SPACE)
    if value[:1] not in ("", '"'):
        return False
    return None if not value or "\\" in value or _starts_one(value[1:], names) else False


def _starts_one(text: str, names: Names) -> bool:
    return any(name.startswith(text) for name in names)


# tags


_FUNCTION: Final = re.compile(r"\s*<function=([^>\s]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER: Final = re.compile(r"\s*<parameter=([^>\n]+)>(.*?)</parameter>\s*(?=<parameter=|\Z)", re.DOTALL)
_KEY_VALUE: Final = re.compile(
    r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*(?=<arg_key>|\Z)", re.DOTALL
)


def _pairs(pattern: re.Pattern[str], text: str) -> dict[str, Any] | None:
    found: dict[str, Any] = {}
    place = 0
    while place < len(text.rstrip(_SPACE)):
        pair = pattern.match(text, place)
        if pair is None:
            return None
        found[pair[1].strip()] = pair[2]
        place = pair.end()
    return found


def parse_parameters(text: str, names: Names) -> Calls | None:
    found = _FUNCTION.fullmatch(text)
    if found is None or found[1] not in names:
        return None
    pairs = _pairs(_PARAMETER, found[2])
    if pairs is None:
        return None
    return [(found[1], {key: value.removeprefix("\n").removesuffix("\n") for key, value in pairs.items()})]


def begins_parameters(text: str, names: Names) -> bool | None:
    rest = text.lstrip(_SPACE)
    mark = "<function="
    if len(rest) < len(mark):
        return None if mark.startswith(rest) else False
    name, end, _ = rest[len(mark) :].partition(">")
    if not rest.startswith(mark):
        return False
    return (name in names) if end else (None if _starts_one(name, names) else False)


def parse_key_values(text: str, names: Names) -> Calls | None:
    name, mark, rest = text.partition("<arg_key>")
    pairs = _pairs(_KEY_VALUE, mark + rest)
    return [(name.strip(), pairs)] if name.strip() in names and pairs is not None else None


def begins_key_values(text: str, names: Names) -> bool | None:
    rest = text.lstrip(_SPACE)
    found = re.match(r"[^\s<]+", rest)
    if not found:
        return None if not rest else False
    if found.end() == len(rest):
        return None if _starts_one(found[0], names) else False
    return found[0] in names


# marks of one family each


_WIDE: Final = re.compile(r"\s*<｜tool▁call▁begin｜>(.*?)<｜tool▁call▁end｜>\s*", re.DOTALL)
_FENCED: Final = re.compile(r"(.*?)\n```json\n(.*)\n```", re.DOTALL)


def parse_wide_bars(text: str, names: Names) -> Calls | None:
    found, place = [], 0
    while place < len(text):
        one = _WIDE.match(text, place)
        if one is None:
            return None
        place = one.end()
        name, mark, rest = one[1].partition("<｜tool▁sep｜>")
        if name.strip() == "function" and (fenced := _FENCED.fullmatch(rest.strip())):
            name, rest = fenced[1], fenced[2]
        arguments = _json(rest.strip())
        if not mark or name.strip() not in names or not isinstance(arguments, dict):
            return None
        found.append((name.strip(), arguments))
    return found or None


_BRACKETED: Final = re.compile(r"\s*([^\[\]{}\s]+)(?:\[CALL_ID\][^\[\]{}]*)?(?:\[ARGS\])?\s*(\{.*\})\s*", re.DOTALL)


def parse_bracketed(text: str, names: Names) -> Calls | None:
    found = _BRACKETED.fullmatch(text)
    if found is None:
        return parse_json(text, names)
    arguments = _json(found[2])
    return [(found[1], arguments)] if found[1] in names and isinstance(arguments, dict) else None


def begins_bracketed(text: str, names: Names) -> bool | None:
    rest = text.lstrip(_SPACE)
    if rest[:1] in ("[", "{", ""):
        return begins_json(text, names)
    found = re.match(r"[^\[\]{}\s]+", rest)
    if found is None:
        return False
    if found.end() == len(rest):
        return None if _starts_one(found[0], names) else False
    return found[0] in names


def parse_pythonic(text: str, names: Names) -> Calls | None:
    """`[f(a=1, b="x"), g()]`, with or without brackets; JSON's true, false and null are known too."""
    try:
        tree: ast.expr = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    found: Calls = []
    for one in tree.elts if isinstance(tree, ast.List | ast.Tuple) else [tree]:
        if not isinstance(one, ast.Call) or one.args:
            return None
        name = ast.unparse(one.func)
        try:
            arguments = {str(part.arg): _literal(part.value) for part in one.keywords if part.arg}
        except (ValueError, RecursionError):
            return None
        if name not in names or len(arguments) != len(one.keywords):
            return None
        found.append((name, arguments))
    return found or None


_WORDS: Final[dict[str, Any]] = {"true": True, "false": False, "null": None}


def _literal(node: ast.expr) -> Any:
    match node:
        case ast.Name(id=word) if word in _WORDS:
            return _WORDS[word]
        case ast.Dict(keys=keys, values=values):
            return {_literal(key): _literal(value) for key, value in zip(keys, values, strict=True) if key is not None}
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_literal(part) for part in parts]
    return ast.literal_eval(node)


def begins_pythonic(text: str, names: Names) -> bool | None:
    rest = text.lstrip(_SPACE)
    if rest.startswith("["):
        rest = rest[1:].lstrip(_SPACE)
    name, mark, _ = rest.partition("(")
    return name.strip() in names if mark else (None if _starts_one(name.rstrip(_SPACE), names) else False)


def begins_anyhow(text: str, names: Names) -> bool | None:
    return True
