"""The matrix: each family asked each question over each API, streamed and whole, on one engine; verdicts as data.

A question has one right answer, because the model is scripted: what it says tells what its prompt held, and how the
engine splits what it says tells what the engine parses. So a cell is proof and no guess by capabilities.

Does not know: how an engine is started, how a page looks.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from abliterated.templates.go import go_template_for
from abliterated.templates.variants import tool_variant
from engine.scripted_gguf import write
from engines import Engine
from templates import families
from templates.asking import DIALECTS, Answer, Conversation
from templates.families import (
    ASK_THINK,
    ASK_TWO,
    CALL_SEEN,
    CONCLUDED,
    NOTHING,
    ONE,
    PLACE,
    RESULT_SEEN,
    SAW_CALL,
    SAW_RESULT,
    THOUGHT,
    TOOL,
    TWO,
    Family,
    assistant,
    result,
    user,
)  # fmt: skip

WAYS = [f"{dialect}{' streamed' if stream else ''}" for dialect in DIALECTS for stream in (False, True)]
YES, ABSENT, NO = "yes", "absent", "no"


@dataclass(frozen=True)
class Check:
    """`right`: "" where the answer is, else what is wrong with it."""

    name: str
    messages: Conversation
    right: Callable[[Answer], str]
    tools: bool = True
    think: bool | None = None


def _calls(*cities: str) -> Callable[[Answer], str]:
    wanted = [("get_weather", {PLACE: city}) for city in cities]

    def right(answer: Answer) -> str:
        if answer.calls == wanted:
            return "" if not answer.content.strip() else f"text beside the call: {answer.content!r}"
        if answer.calls:
            return f"calls {answer.calls}"
        return "the tools are not in the prompt" if NOTHING in answer.content else f"no call in {answer.content!r}"

    return right


def _says(text: str) -> Callable[[Answer], str]:
    def right(answer: Answer) -> str:
        if answer.content.strip() == text and not answer.calls:
            return ""
        return f"the prompt does not hold it: calls {answer.calls}" if answer.calls else f"{answer.content!r}"

    return right


def _tools_seen(answer: Answer) -> str:
    seen = NOTHING not in answer.content and (answer.content or answer.calls)
    return "" if seen else "the tools are not in the prompt"


def _split(answer: Answer) -> str:
    if (answer.content.strip(), answer.thinking.strip()) == (CONCLUDED, THOUGHT):
        return ""
    return f"thinking {answer.thinking!r}, content {answer.content!r}"


def round_trip(cities: Sequence[str], *, in_call: bool) -> Conversation:
    """A conversation whose last call, or whose last result, holds the marker."""
    places = list(cities)
    if in_call:
        places[-1] = f"{CALL_SEEN} town"
    results = [result(at, "sun") for at in range(len(places))]
    if not in_call:
        results[-1] = result(len(places) - 1, f"{RESULT_SEEN} rain")
    return [user(), assistant(places), *results]


CHECKS = (
    Check("tools in prompt", [user()], _tools_seen),
    Check("call parsed", [user()], _calls(*ONE)),
    Check("call rendered", round_trip(ONE, in_call=True), _says(SAW_CALL)),
    Check("result rendered", round_trip(ONE, in_call=False), _says(SAW_RESULT)),
    Check("two calls parsed", [user(f"Both {ASK_TWO} please")], _calls(*TWO)),
    Check("two calls rendered", round_trip(TWO, in_call=True), _says(SAW_CALL)),
    Check("two results rendered", round_trip(TWO, in_call=False), _says(SAW_RESULT)),
    Check("thinking split", [user(f"Well {ASK_THINK} then")], _split, tools=False, think=True),
)


def ask_all(
    http: httpx.Client, model: str, dialects: Sequence[str] = (), skipped: Collection[str] = ()
) -> dict[str, dict[str, str]]:
    """Verdicts by check and way: `yes`, `absent` (no such route), or `no: ` and why."""
    found: dict[str, dict[str, str]] = {}
    asked: dict[tuple[int, str], Answer] = {}
    for check in CHECKS:
        if check.name in skipped:
            continue
        row = found[check.name] = {}
        for way in WAYS:
            dialect = way.removesuffix(" streamed")
            if dialects and dialect not in dialects:
                continue
            key = (id(check.messages) if check.name != "call parsed" else id(CHECKS[0].messages), way)
            if key not in asked:
                tools: list[Any] = [TOOL] if check.tools else []
                asked[key] = DIALECTS[dialect](http, model, check.messages, tools, dialect != way, check.think)
            row[way] = verdict(check, asked[key])
    return found


def verdict(check: Check, answer: Answer) -> str:
    if answer.error == "no such route":
        return ABSENT
    wrong = answer.error or check.right(answer)
    return f"{NO}: {wrong}" if wrong else YES


def create(http: httpx.Client, model: str, gguf: Path, **fields: Any) -> None:
    """The model in the engine; AssertionError with the engine's words where it won't."""
    digest = f"sha256:{hashlib.sha256(gguf.read_bytes()).hexdigest()}"
    assert http.post(f"/api/blobs/{digest}", content=gguf.read_bytes()).status_code in (200, 201)
    body = {"model": model, "files": {"model.gguf": digest}, "stream": False, **fields}
    answer = http.post(
        "/api/create",
        json={"parameters": {"temperature": 0, "num_thread": 1, "num_ctx": 8192, "num_predict": 200}, **body},
    )
    assert answer.json() == {"status": "success"}, answer.text


def does_not_apply(family: Family) -> set[str]:
    skipped = set() if family.thinks else {"thinking split"}
    return skipped | ({"two calls parsed"} if families.one_at_a_time(family) else set())


def run_family(
    http: httpx.Client, family: Family, folder: Path, *, dialects: Sequence[str] = (), other: Family | None = None,
    **fields: Any,
) -> dict[str, dict[str, str]]:  # fmt: skip
    """Build, register, ask, delete. `other`: whose dialect the model speaks, see `families.scripted`."""
    gguf = write(folder / f"{family.name}.gguf", families.scripted(family, other=other))
    name = f"matrix-{family.name.lower()[:60]}"
    create(http, name, gguf, **fields)
    try:
        return ask_all(http, name, dialects, does_not_apply(other or family))
    finally:
        http.post("/api/chat", json={"model": name, "messages": [], "keep_alive": 0})
        http.request("DELETE", "/api/delete", json={"model": name})
        gguf.unlink()


def run_engine(
    engine: Engine, wanted: Sequence[Family], folder: Path, *, dialects: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Rows by family: as published, and as we mend it where we do. On an Ollama before 0.30 with the Go template that
    registration would send."""
    rows: dict[str, dict[str, Any]] = {}
    with engine.start() as running, httpx.Client(base_url=running.base_url, timeout=120, trust_env=False) as http:
        for family in wanted:
            mended = tool_variant(family.jinja, name=family.name)
            versions = [(family, None), *([(replace(family, jinja=mended.jinja), family)] if mended else [])]
            for shown, other in versions:
                fields: dict[str, Any] = {}
                if engine.version and engine.version < (0, 30, 0):
                    if other:
                        continue  # what it is told is learnt from the published one as well as from this
                    fields = {"template": template} if (template := go_template_for(shown.jinja)) else {}
                verdicts = run_family(http, shown, folder, dialects=dialects, other=other, **fields)
                name = f"{family.name}, mended" if other else family.name
                rows[name] = {"own": family.own, "cells": cells(verdicts)}
                if engine.version and engine.version < (0, 30, 0):
                    rows[name]["template"] = "Go" if fields else "none"
    return rows


def cells(verdicts: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Each check as one word and the first reason against it. Routes that are absent don't count."""
    found = {}
    for check, ways in verdicts.items():
        asked = {way: verdict for way, verdict in ways.items() if verdict != ABSENT}
        wrong = {way: verdict for way, verdict in asked.items() if verdict != YES}
        word = YES if not wrong else NO if len(wrong) == len(asked) else _some(set(wrong), set(asked))
        reason = next(iter(wrong.values()), "").removeprefix(f"{NO}: ")
        found[check] = {"cell": word} | ({"why": _short(reason)} if reason else {})
    return found


def _some(wrong: set[str], asked: set[str]) -> str:
    """The shorter of: where it works, where it doesn't. A route stands for both its ways."""

    def routes(ways: set[str]) -> str:
        names = []
        for dialect in DIALECTS:
            found = {way for way in ways if way.removesuffix(" streamed") == dialect}
            names += [dialect] if len(found) == 2 else sorted(found)
        return ", ".join(names)

    fails, works = "not " + routes(wrong), "only " + routes(asked - wrong)
    return fails if len(fails) <= len(works) else works


def _short(reason: str) -> str:
    """One line, without what differs from run to run."""
    line = re.sub(r"(registry\.ollama\.ai/library/)?matrix-[\w.:-]+", "MODEL", " ".join(reason.split()))
    return line if len(line) <= 140 else line[:139] + "…"
