"""What a chat template really does with tools, found by rendering conversations and looking for what was put in.

A template that mentions tools may yet drop them: nothing is believed that was not seen. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal

from abliterated.templates.rendering import TemplateRefuses, render

Ability = Literal["system", "tools", "calls", "results", "several calls"]

TOOL: Final[dict[str, Any]] = {
    "type": "function",
    "function": {
        "name": "count_ducks",
        "description": "tells how many ducks swim",
        "parameters": {
            "type": "object",
            "properties": {"pond": {"type": "string", "description": "which pond"}},
            "required": ["pond"],
        },
    },
}
ASK: Final[dict[str, Any]] = {"role": "user", "content": "How many ducks?"}
SYSTEM: Final[dict[str, Any]] = {"role": "system", "content": "Speak plainly of birds."}
_ID: Final = ("aduckpnd1", "aduckpnd2")  # nine letters or digits, which some templates insist on
_PONDS: Final = ("northern", "southern")
_COUNTS: Final = ("seventeen", "twentynine")


def abilities(jinja: str) -> frozenset[Ability]:
    """Everything of tools that reaches the prompt. Empty for a template that can't be rendered."""
    found: set[Ability] = set()
    if SYSTEM["content"] in _first(jinja, [[SYSTEM, ASK]]):
        found.add("system")
    told = _first(jinja, [[ASK]], [TOOL])
    if all(word in told for word in ("count_ducks", "tells how many", "pond")):
        found.add("tools")
    one, two = (_first(jinja, list(round_trips(count)), [TOOL]) for count in (1, 2))
    if _PONDS[0] in one and "count_ducks" in one.partition(ASK["content"])[2]:
        found.add("calls")
    if _COUNTS[0] in one:
        found.add("results")
    if all(word in two for word in (*_PONDS, *_COUNTS)):
        found.add("several calls")
    return frozenset(found)


def round_trips(count: int) -> Iterator[list[dict[str, Any]]]:
    """A question, calls and their results, as engines send them: empty content, arguments an object or else text."""
    for as_text in (False, True):
        calls = []
        for place in range(count):
            arguments: Any = {"pond": _PONDS[place]}
            function = {"name": "count_ducks", "arguments": json.dumps(arguments) if as_text else arguments}
            calls.append({"id": _ID[place], "type": "function", "function": function})
        results = [
            {"role": "tool", "tool_call_id": _ID[place], "name": "count_ducks", "content": _COUNTS[place]}
            for place in range(count)
        ]
        yield [ASK, {"role": "assistant", "content": "", "tool_calls": calls}, *results]


def _first(
    jinja: str, talks: Sequence[Sequence[Mapping[str, Any]]], tools: Sequence[Mapping[str, Any]] | None = None
) -> str:
    """The first rendering that shows a call where there is one, else the last that is one at all."""
    text = ""
    for talk in talks:
        try:
            text = render(jinja, talk, tools=tools, enable_thinking=True)
        except TemplateRefuses:
            continue
        if _PONDS[0] in text:
            break
    return text
