"""Proof that a registered model talks as its base does: the same prompts rendered for both, in the same engine.

The oracle is the engine itself (`_debug_render_only`), asked about the base and about the new model; then one greedy
answer shows that the weights load and speak. A difference is a named note with its diff, never silent.

Does not know whether the answers are good: that is the evaluation's work.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from abliterate.contract.errors import EngineRefused, NotFound
from abliterated.ollama.client import OllamaClient

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "count_ducks",
        "description": "How many ducks are on a pond",
        "parameters": {
            "type": "object",
            "properties": {"pond": {"type": "string", "description": "Which pond"}},
            "required": ["pond"],
        },
    },
}
_ASK: dict[str, Any] = {"role": "user", "content": "How many ducks are on the north pond?"}
_SYSTEM: dict[str, Any] = {"role": "system", "content": "You count ducks and say nothing else."}
_CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "count_ducks", "arguments": {"pond": "north"}}}],
}
_RESULT: dict[str, Any] = {"role": "tool", "tool_name": "count_ducks", "content": '{"ducks": 7}'}
_TURNS: list[dict[str, Any]] = [_ASK, {"role": "assistant", "content": "Seven."}, {"role": "user", "content": "Now?"}]


@dataclass(frozen=True)
class Sentinel:
    """A conversation whose rendering tells whether something was lost."""

    name: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    think: bool | None = None


@dataclass(frozen=True)
class Certificate:
    """`compared`: conversations rendered for both; `failures`: where they differ; `notes`: what could not be seen."""

    answer: str
    compared: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def sentinels(capabilities: Collection[str]) -> list[Sentinel]:
    """The conversations worth asking about a model that can do this."""
    found = [Sentinel("plain", _TURNS), Sentinel("system", [_SYSTEM, _ASK])]
    if "tools" in capabilities:
        found.append(Sentinel("tools", [_SYSTEM, _ASK], [TOOL]))
        found.append(Sentinel("tool round trip", [_ASK, _CALL, _RESULT], [TOOL]))
    if "thinking" in capabilities:
        found += [Sentinel("thinking on", [_ASK], think=True), Sentinel("thinking off", [_ASK], think=False)]
    return found


async def certify(client: OllamaClient, target: str, base: str, capabilities: Collection[str]) -> Certificate:
    """Compare `target` with `base` on every sentinel, then let it speak. Raises EngineUnavailable."""
    compared, failures, notes = [], [], []
    for sentinel in sentinels(capabilities) if base and "completion" in capabilities else ():
        wanted, found = await _render(client, base, sentinel), await _render(client, target, sentinel)
        if isinstance(found, EngineRefused) and not isinstance(wanted, EngineRefused):
            failures.append(f"{sentinel.name}: the base takes it, the new model does not ({found.message})")
        elif isinstance(wanted, EngineRefused) or isinstance(found, EngineRefused):
            notes.append(f"{sentinel.name}: the base itself refuses it")
        elif wanted is None or found is None:
            notes.append("this engine does not show rendered prompts, so they were not compared")
            break
        else:
            compared.append(sentinel.name)
            if wanted != found:
                failures.append(f"{sentinel.name}: the prompt differs from the base's\n{_diff(wanted, found)}")
    answer = await _speak(client, target) if "completion" in capabilities else ""
    if "completion" in capabilities and not answer:
        notes.append("the greedy answer to one question was empty")
    return Certificate(answer, tuple(compared), tuple(failures), tuple(notes))


async def _render(client: OllamaClient, name: str, sentinel: Sentinel) -> str | EngineRefused | None:
    """The prompt; the refusal; or None where this engine answers instead of showing."""
    try:
        shown = await client.chat_once(
            name, sentinel.messages, tokens=1, tools=sentinel.tools, think=sentinel.think, render_only=True
        )
    except EngineRefused as error:
        return error
    except NotFound as error:
        return EngineRefused(error.message, remedy=error.remedy)
    info = shown.get("_debug_info")
    rendered = info.get("rendered_template") if isinstance(info, Mapping) else None
    return rendered if isinstance(rendered, str) else None


async def _speak(client: OllamaClient, name: str) -> str:
    """One greedy answer, a few tokens long."""
    said = (await client.chat_once(name, [_ASK], tokens=24)).get("message")
    return str(said.get("content") or said.get("thinking") or "") if isinstance(said, Mapping) else ""


def _diff(wanted: str, found: str, most: int = 40) -> str:
    lines = list(difflib.unified_diff(wanted.splitlines(), found.splitlines(), "base", "new model", lineterm="", n=1))
    return "\n".join(lines[:most] + (["…"] if len(lines) > most else []))
