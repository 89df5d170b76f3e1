"""Proof that a registered model talks as its base does: the same prompts rendered for both, in the same engine.

The oracle is the engine itself (`_debug_render_only`), asked about the base and about the new model; then one greedy
answer shows that the weights load and speak. A difference is named with its diff, never silent: what the base can and
the new model can't is a failure; what nobody could compare is a note.

The base's conversations come first and then the new model's, so that an engine with room for one model loads each
once; what was not loaded before is unloaded again. Does not know whether the answers are good: that is the
evaluation's work.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from abliterate.contract.errors import AbliteratedError, EngineRefused, NotFound
from abliterated.ollama.client import EngineFailed, OllamaClient
from abliterated.ollama.modelfile import from_show
from abliterated.ollama.own_rendering import unlike
from abliterated.ollama.request import content_of
from abliterated.ollama.version import Generation, Version

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "count_ducks",
        "description": "How many ducks are on a pond",
        "parameters": {
            "type": "object",
            "required": ["pond"],  # before the properties, as newer engines order it when they pass it on
            "properties": {"pond": {"type": "string", "description": "Which pond"}},
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

RENDERS_SINCE = (0, 11, 5)  # before it, the debug field is ignored and the model would answer


@dataclass(frozen=True)
class Sentinel:
    """A conversation whose rendering tells whether something was lost."""

    name: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    think: bool | None = None


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """What is other than in the base. `failure` False: worth knowing, but no reason to refuse."""

    what: str
    text: str
    diff: str = ""
    failure: bool = True


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """`reference`: the model compared with, "" for none. `compared`: the conversations rendered for both."""

    model: str
    reference: str = ""
    engine: str = ""
    content: str = ""
    answer: str = ""
    compared: list[str] = msgspec.field(default_factory=list)
    differences: list[Difference] = msgspec.field(default_factory=list)
    notes: list[str] = msgspec.field(default_factory=list)
    seconds: float = 0.0

    @property
    def failures(self) -> list[Difference]:
        return [difference for difference in self.differences if difference.failure]

    @property
    def warnings(self) -> list[Difference]:
        return [difference for difference in self.differences if not difference.failure]


Rendering = str | EngineRefused | None  # the prompt; the refusal; None where the engine answers instead of showing


def sentinels(capabilities: Collection[str]) -> list[Sentinel]:
    """The conversations worth asking about a model that can do this."""
    if "completion" not in capabilities:
        return []
    found = [Sentinel("plain", _TURNS), Sentinel("system", [_SYSTEM, _ASK])]
    if "tools" in capabilities:
        found.append(Sentinel("tools", [_SYSTEM, _ASK], [TOOL]))
        found.append(Sentinel("tool round trip", [_ASK, _CALL, _RESULT], [TOOL]))
    if "thinking" in capabilities:
        found += [Sentinel("thinking on", [_ASK], think=True), Sentinel("thinking off", [_ASK], think=False)]
    return found


async def certify(
    client: OllamaClient, target: str, reference: str = "", *, baked: bool = False, jinja: str = ""
) -> Certificate:
    """Compare `target` with `reference` on every sentinel, then let it speak.

    `baked`: the template in the GGUF was changed on purpose, so tools may be rendered otherwise than in the base.
    `jinja`: the template in the GGUF, for a second opinion where there is no reference.
    Raises NotFound where there is no `target`, EngineUnavailable where the engine fails at both.
    """
    start = time.monotonic()
    version = await client.version()
    shown = await client.show(target)
    loaded = {str(row.get("name")) for row in await client.ps()}
    differences: list[Difference] = []
    notes: list[str] = []
    compared: list[str] = []
    wanted = await _abilities(client, reference) if reference else None
    if reference and wanted is None:
        notes.append(f"{reference} is not in this engine any more, so nothing was compared with it")
    abilities = _capabilities(shown)
    if wanted is not None:
        differences += capability_differences(wanted, abilities, baked=baked)
        asked = sentinels(wanted)
        if asked and not renders(version):
            notes.append(f"Ollama {version.text} does not show rendered prompts, so they were not compared")
        elif asked:
            before = await _render_all(client, reference, asked, keep=reference in loaded)
            after = await _render_all(client, target, asked, keep=True)
            if any(one is None for one in (*before, *after)):
                notes.append("this engine does not show rendered prompts, so they were not compared")
            else:
                for sentinel, old, new in zip(asked, before, after, strict=True):
                    if text(old) != text(new):  # once more: the clock may have struck midnight in between
                        old, new = await _render(client, reference, sentinel), await _render(client, target, sentinel)
                    difference, note = judge(sentinel, old, new, baked=baked)
                    differences += [difference] if difference else []
                    notes += [note] if note else []
                    if not note:
                        compared.append(sentinel.name)
    elif jinja and renders(version) and not (from_show(shown).renderer or from_show(shown).parser):
        differences += await _second_opinion(client, target, jinja, sentinels(abilities))
    answer = ""
    if "completion" in abilities:
        answer, complaint = await _speak(client, target, reference if wanted is not None else "")
        differences += [complaint] if complaint else []
        if not answer and not complaint:
            notes.append("the greedy answer to one question was empty")
    for name in (target, reference):
        if name and name not in loaded:
            await _unload(client, name)
    return Certificate(
        model=target,
        reference=reference if wanted is not None else "",
        engine=version.text,
        content=content_of(shown),
        answer=answer,
        compared=compared,
        differences=differences,
        notes=notes,
        seconds=round(time.monotonic() - start, 3),
    )


def renders(version: Version) -> bool:
    """Does this engine show the prompt instead of answering?"""
    return version.generation is not Generation.LEGACY or version.numbers >= RENDERS_SINCE


def judge(sentinel: Sentinel, wanted: Rendering, found: Rendering, *, baked: bool) -> tuple[Difference | None, str]:
    """What the two renderings of one conversation say: a difference, or a note where nothing could be compared."""
    excused = baked and bool(sentinel.tools)
    if isinstance(wanted, EngineRefused):
        if isinstance(found, EngineRefused):
            return None, f"{sentinel.name}: the base itself refuses it"
        said = "the new model takes it, the base does not"
        return Difference(what=sentinel.name, text=said, failure=False), ""
    if isinstance(found, EngineRefused):
        said = f"the base takes it, the new model does not ({found.message})"
        return Difference(what=sentinel.name, text=said), ""
    if wanted is None or found is None:
        return None, f"{sentinel.name}: was not rendered"
    if wanted == found:
        return None, ""
    said = "the prompt differs from the base's" + (", by the template baked in" if excused else "")
    return Difference(what=sentinel.name, text=said, diff=_diff(wanted, found), failure=not excused), ""


def capability_differences(wanted: Collection[str], found: Collection[str], *, baked: bool) -> list[Difference]:
    """What was lost is a failure, what was gained worth knowing."""
    lost = [
        Difference(what=f"capability {name}", text="the base has it, the new model does not")
        for name in sorted(set(wanted) - set(found))
    ]
    why = "the template baked in gives it" if baked else "the engine claims it, the base has it not"
    return lost + [
        Difference(what=f"capability {name}", text=why, failure=False) for name in sorted(set(found) - set(wanted))
    ]


def text(rendering: Rendering) -> str:
    """For comparing: refusals name the model, so only that there is one counts."""
    return rendering if isinstance(rendering, str) else "\x00refused"


async def render_sentinel(client: OllamaClient, name: str, sentinel: Sentinel) -> str | None:
    """The prompt the engine makes of it; None where it refuses or doesn't show."""
    found = await _render(client, name, sentinel)
    return found if isinstance(found, str) else None


async def _abilities(client: OllamaClient, name: str) -> list[str] | None:
    try:
        return _capabilities(await client.show(name))
    except NotFound:
        return None


def _capabilities(show: Mapping[str, Any]) -> list[str]:
    """What the engine says the model can do; an engine too old to say it has models that complete."""
    said = show.get("capabilities")
    return [str(one) for one in said] if isinstance(said, list) else ["completion"]


async def _render_all(client: OllamaClient, name: str, asked: Sequence[Sentinel], *, keep: bool) -> list[Rendering]:
    found = []
    for sentinel in asked:
        found.append(await _render(client, name, sentinel))
        if found[-1] is None:
            break
    if not keep:
        await _unload(client, name)
    return found + [None] * (len(asked) - len(found))


async def _render(client: OllamaClient, name: str, sentinel: Sentinel) -> Rendering:
    try:
        shown = await client.chat_once(
            name, sentinel.messages, tokens=1, tools=sentinel.tools, think=sentinel.think, render_only=True
        )
    except EngineRefused as error:
        return error
    except (NotFound, EngineFailed) as error:
        return EngineRefused(error.message, remedy=error.remedy)
    info = shown.get("_debug_info")
    rendered = info.get("rendered_template") if isinstance(info, Mapping) else None
    return rendered if isinstance(rendered, str) else None


async def _speak(client: OllamaClient, name: str, reference: str) -> tuple[str, Difference | None]:
    """One greedy answer, a few tokens long; a difference where only the reference gives one."""
    try:
        answer = await _answer(client, name)
        failure: AbliteratedError | None = None
    except (EngineFailed, EngineRefused) as error:
        answer, failure = "", error
    if answer:
        return answer, None
    if reference:
        try:
            expected = await _answer(client, reference)
        except (EngineFailed, EngineRefused):
            expected = ""
        if failure is None:
            silent = Difference(what="answer", text="the base answers one question, the new model says nothing")
            return "", silent if expected else None
        if expected:
            return "", Difference(what="answer", text=f"the base answers, the new model does not ({failure.message})")
    if failure is None:
        return "", None
    if isinstance(failure, EngineFailed) and "memory" in failure.message:
        raise failure  # too little of it now: that passes
    if isinstance(failure, EngineFailed) and reference:
        raise failure  # the engine fails at both
    return "", Difference(what="answer", text=f"the new model does not answer ({failure.message})")


async def _answer(client: OllamaClient, name: str) -> str:
    said = (await client.chat_once(name, [_ASK], tokens=12)).get("message")
    return str(said.get("content") or said.get("thinking") or "") if isinstance(said, Mapping) else ""


async def _second_opinion(client: OllamaClient, name: str, jinja: str, asked: Sequence[Sentinel]) -> list[Difference]:
    """Where the engine renders otherwise than the Jinja inside says. Engines differ in round trips, so not those."""
    found: list[Difference] = []
    for sentinel in asked:
        prompt = await _render(client, name, sentinel) if sentinel.name != "tool round trip" else None
        if isinstance(prompt, str) and (
            ours := unlike(jinja, prompt, sentinel.messages, sentinel.tools, sentinel.think)
        ):
            said = "the prompt is not what the template inside the GGUF says, as we render it"
            found.append(
                Difference(
                    what=sentinel.name, text=said, diff=_diff(ours, prompt, "ours", "the engine's"), failure=False
                )
            )
    return found


async def _unload(client: OllamaClient, name: str) -> None:
    """Nothing stays loaded that was not: best effort, the engine forgets it by itself in minutes."""
    try:
        await client.unload(name, seconds=10)
    except AbliteratedError:
        return


def _diff(wanted: str, found: str, one: str = "base", other: str = "new model", most: int = 40) -> str:
    lines = list(difflib.unified_diff(wanted.splitlines(), found.splitlines(), one, other, lineterm="", n=1))
    if not lines:
        return f"{one} {wanted[-80:]!r}, {other} {found[-80:]!r}"
    return "\n".join(lines[:most] + (["…"] if len(lines) > most else []))
