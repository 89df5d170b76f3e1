"""Arguments as a tool's JSON schema types them. Pure.

Dialects that write values as plain text lose their types, and models write "3" where 3 is meant; only what converts
beyond doubt is converted, all else stays as it was written.

Does not know: dialects; it validates nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Tools = Mapping[str, Mapping[str, Any]]  # name → schema of its parameters


def index(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """By name; what is no function tool is left out."""
    found: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            parameters = function.get("parameters")
            found[function["name"]] = parameters if isinstance(parameters, Mapping) else {}
    return found


def typed(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties")
    known = properties if isinstance(properties, Mapping) else {}
    return {key: _typed(value, _types(known.get(key))) for key, value in arguments.items()}


def _types(schema: Any) -> frozenset[str]:
    """The types a value may have; empty where the schema doesn't say."""
    if not isinstance(schema, Mapping):
        return frozenset()
    told = schema.get("type")
    among = told if isinstance(told, list) else [told]
    found = {one for one in among if isinstance(one, str)}
    for key in ("anyOf", "oneOf"):
        for one in schema.get(key) or ():
            found |= _types(one)
    return frozenset(found)


def _typed(value: Any, types: frozenset[str]) -> Any:
    if not types:
        return value
    if not isinstance(value, str):
        if types <= {"string", "null"} and value is not None:
            return json.dumps(value, ensure_ascii=False)
        return value
    if "string" in types:
        return value
    try:
        meant = json.loads(value)
    except (ValueError, RecursionError):
        meant = {"true": True, "false": False, "none": None}.get(value.strip().lower(), value)
    return meant if _is(meant, types) else value


def _is(value: Any, types: frozenset[str]) -> bool:
    match value:
        case None:
            return "null" in types
        case bool():
            return "boolean" in types
        case int():
            return bool(types & {"integer", "number"})
        case float():
            return "number" in types or ("integer" in types and value.is_integer())
        case dict():
            return "object" in types
        case list():
            return "array" in types
    return False
