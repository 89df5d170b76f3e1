"""Tools to try a model's calls with: a clock, a calculator, dice, a counter of words. None of them touches anything.

Whatever a model calls is answered, with what was wrong where something was, as a tool's answer: it never raises.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from abliterate.chat.calculator import NotArithmetic, calculate

_SHOWN: Final = 120


@dataclass(frozen=True)
class Tool:
    """What a model is told of a tool, and what is done when it calls."""

    name: str
    description: str
    parameters: Mapping[str, Mapping[str, str]]
    required: tuple[str, ...]
    act: Callable[..., object]

    def schema(self) -> dict[str, Any]:
        """As the API wants it."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": {"type": "object", "properties": dict(self.parameters), "required": list(self.required)},
            },
        }


class _Wrong(Exception):
    pass


def _clock(timezone: str = "") -> str:
    timezone = str(timezone or "")
    if timezone.lower() in ("", "local", "here"):
        return datetime.now().astimezone().isoformat(timespec="seconds")
    from zoneinfo import ZoneInfo

    try:
        return datetime.now(ZoneInfo(timezone)).isoformat(timespec="seconds")
    except (KeyError, ValueError, OSError) as error:
        raise _Wrong(f"no time zone {timezone!r}; as in Europe/Berlin") from error


def _roll(sides: int = 6, count: int = 1) -> list[int]:
    sides, count = int(sides), int(count)
    if not (2 <= sides <= 1000 and 1 <= count <= 100):
        raise _Wrong("2 to 1000 sides, 1 to 100 dice")
    return [random.randint(1, sides) for _ in range(count)]  # noqa: S311 - dice


def _words(text: str) -> dict[str, int]:
    return {"words": len(str(text).split()), "characters": len(str(text))}


TOOLS: Final = (
    Tool(
        "current_time",
        "The current date and time.",
        {"timezone": {"type": "string", "description": "an IANA name, as Europe/Berlin; left out: the local one"}},
        (),
        _clock,
    ),
    Tool(
        "calculate",
        "The exact value of an arithmetic expression.",
        {"expression": {"type": "string", "description": "as in 2 * (3 + 4) ** 2, with sqrt, log, sin … where needed"}},
        ("expression",),
        lambda expression: calculate(str(expression)),
    ),
    Tool(
        "roll_dice",
        "Roll dice.",
        {
            "sides": {"type": "integer", "description": "of each die; 6 if left out"},
            "count": {"type": "integer", "description": "how many; 1 if left out"},
        },
        (),
        _roll,
    ),
    Tool(
        "count_words",
        "How many words and characters a text has.",
        {"text": {"type": "string", "description": "the text"}},
        ("text",),
        _words,
    ),
)
_BY_NAME: Final = {tool.name: tool for tool in TOOLS}


def call_tool(call: Mapping[str, Any]) -> tuple[str, str, str]:
    """Do what a model calls; returns the tool's name, the call as a person reads it, and the answer as JSON."""
    function = call.get("function")
    function = function if isinstance(function, Mapping) else {}
    name, arguments = str(function.get("name") or ""), function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    given = arguments if isinstance(arguments, Mapping) else {}
    shown = ", ".join(f"{key}={_short(value)}" for key, value in given.items())
    return name, f"{name}({shown})", json.dumps(_result(name, given), ensure_ascii=False)


def _result(name: str, given: Mapping[str, Any]) -> Any:
    tool = _BY_NAME.get(name)
    if tool is None:
        return {"error": f"no tool {name!r}; there are {', '.join(_BY_NAME)}"}
    if unknown := [key for key in given if key not in tool.parameters]:
        return {"error": f"{name} takes no {unknown[0]!r}; it takes {', '.join(tool.parameters)}"}
    if missing := [key for key in tool.required if key not in given]:
        return {"error": f"{name} needs {missing[0]!r}"}
    try:
        return {"result": tool.act(**given)}
    except (NotArithmetic, _Wrong) as error:
        return {"error": str(error)}
    except (ValueError, TypeError, OverflowError):
        return {"error": f"{name}: an argument is of the wrong kind"}


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
