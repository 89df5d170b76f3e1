"""A model put right by its manifest alone: created from itself with its base's template and the rest, in an instant.

No weight is read or written. A copy to go back to is kept under another name first; `go_back` uses it. What can't be
taken away by creating a model from itself (an inherited RENDERER or PARSER) is left out by creating it from its own
blobs instead. Does not know who asks.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace as changed
from typing import Any

from abliterate.contract.care import Finding, Repaired
from abliterate.contract.errors import ConflictError, EngineRefused, ModelError, NotFound
from abliterate.contract.names import ModelName, parse_name
from abliterated.ollama import request
from abliterated.ollama.client import OllamaClient
from abliterated.ollama.doctor import diagnose, examine
from abliterated.ollama.facts import Facts, find_base, look_at, same_kind
from abliterated.ollama.modelfile import Modelfile
from abliterated.ollama.register import find_show, go_template
from abliterated.ollama.request import MARKERS, Digests, blob_digest
from abliterated.ollama.version import Generation

BEFORE = "-before-repair"
_ADDED = "TEMPLATE: the engine added"  # what it would add to any model
_CURABLE = {
    "template-missing",
    "template-dummy",
    "template-lost",
    "tools-lost",
    "tools-lie",
    "tools-one-way",
    "renderer-lost",
    "parser-lost",
    "stop-markers",
    "renderer-unpaired",
    "capability-tools",
    "capability-thinking",
    "capability-insert",
}


def backup_name(name: str) -> str:
    """Where the copy from before the repair lies: `qwen3-before-repair:8b`."""
    full = parse_name(name)
    return ModelName(full.host, full.namespace, full.model[: 80 - len(BEFORE)] + BEFORE, full.tag).short()


async def repair(client: OllamaClient, name: str, base: str = "") -> Repaired:
    """Give `name` what its base has: TEMPLATE, RENDERER, PARSER, stop strings and the parameters it lacks.

    `base`: the model to take it from; otherwise the one it was probably made from. Raises NotFound, ModelError,
    ConflictError where the two are not of one kind, EngineRefused where the engine makes something else of it.
    """
    start = time.monotonic()
    facts = await look_at(client, name)
    source = await look_at(client, base, facts.version) if base else await find_base(client, facts)
    if source is not None and not same_kind(facts, source):
        raise ConflictError(
            f"{source.name} is {_kind(source)}, {facts.name} is {_kind(facts)}: its template would not fit",
            remedy="Name the model it was made from with --from",
        )
    ill = [finding for finding in examine(facts, source) if finding.level in ("problem", "warning")]
    wanted, notes = planned(facts, source)
    differences = request.differences(wanted, facts.modelfile)
    if not differences or (not base and not any(finding.key in _CURABLE for finding in ill)):
        return await _nothing_done(client, facts, source, ill, start)

    backup = await _back_up(client, facts)
    await client.create(request_for(facts, wanted))
    after = await look_at(client, facts.name, facts.version)
    left = [note for note in request.differences(wanted, after.modelfile) if not note.startswith(_ADDED)]
    if left:
        await client.copy(backup, facts.name)
        raise EngineRefused(
            f"{facts.name}: the engine made something else of it ({'; '.join(left)[:300]}), so it is as it was",
            remedy="Update Ollama, or register the model anew",
        )
    # A runner that is loaded serves by the old manifest's way of rendering; the next load decides anew.
    if facts.name in {str(row.get("name")) for row in await client.ps()}:
        await client.unload(facts.name, seconds=5)
    await asyncio.to_thread(os.sync)
    return Repaired(
        model=facts.name,
        base=source.name if source else "",
        backup=backup,
        changed=[*_told(facts.modelfile, after.modelfile, facts, after), *notes],
        seconds=round(time.monotonic() - start, 3),
        diagnosis=await diagnose(client, facts.name, source.name if source else ""),
    )


async def go_back(client: OllamaClient, name: str) -> Repaired:
    """Undo the last repair: the copy gets its name again. Raises NotFound where there is none."""
    start = time.monotonic()
    short, backup = parse_name(name).short(), backup_name(name)
    if await find_show(client, backup) is None:
        raise NotFound(
            f"{short}: there is no copy from before a repair ({backup})", remedy="`ollama list` shows the names"
        )
    await client.copy(backup, short)
    await client.delete(backup)
    await asyncio.to_thread(os.sync)
    return Repaired(
        model=short,
        changed=[f"as it was before the repair; {backup} is gone"],
        seconds=round(time.monotonic() - start, 3),
        diagnosis=await diagnose(client, short),
    )


def planned(facts: Facts, source: Facts | None) -> tuple[Modelfile, list[str]]:
    """The modelfile as it should be, and what to say of it. Its own SYSTEM, LICENSE and MESSAGE lines stay."""
    mine, notes = facts.modelfile, list[str]()
    parameters = tuple((key, value) for key, value in mine.parameters if not _cuts(key, value))
    if source is None:
        template = mine.template
        if facts.version.generation is Generation.LEGACY and not facts.template and facts.jinja:
            template = go_template(facts.jinja) or template
        return changed(mine, template=template, parameters=parameters, others=()), notes
    theirs, said = request.carried(source.modelfile)
    notes += said
    names = {key for key, _ in parameters}
    if "stop" in {key for key, _ in theirs.parameters}:
        parameters = tuple((key, value) for key, value in parameters if key != "stop")
        names.discard("stop")
    parameters += tuple((key, value) for key, value in theirs.parameters if key not in names)
    # A template of its own that shows tools, on a base without any, is somebody's work and stays.
    keeps = bool(facts.template) and not source.template and not theirs.renderer
    return (
        changed(
            mine,
            template=mine.template if keeps else theirs.template,
            renderer=theirs.renderer,
            parser=theirs.parser,
            requires=theirs.requires or mine.requires,
            system=mine.system or theirs.system,
            licenses=mine.licenses or theirs.licenses,
            parameters=parameters,
            others=(),
        ),
        notes,
    )


def request_for(facts: Facts, wanted: Modelfile) -> dict[str, Any]:
    """The body of the creation: from itself where that can say it, else from its own blobs."""
    mine = facts.modelfile
    loses = (mine.renderer and not wanted.renderer) or (mine.parser and not wanted.parser)
    loses = loses or (bool(facts.template) and wanted.template is None)
    layers = [blob_digest(path) for path in mine.models]
    adapters = [blob_digest(path) for path in mine.adapters]
    if loses:
        if not all((*layers, *adapters)):
            raise ModelError(
                f"{facts.name}: its blobs are not shown, so its renderer can't be taken away",
                remedy="Register it anew from its GGUF",
            )
        drafts = [blob_digest(path) for path in mine.drafts]
        return request.create_request(
            facts.name, wanted, Digests(layers[0], tuple(layers[1:]), tuple(adapters), tuple(drafts))
        )
    body: dict[str, Any] = {"model": facts.name, "from": facts.name, "stream": True}
    if wanted.template and wanted.template != mine.template:
        body["template"] = wanted.template
    for field in ("renderer", "parser", "requires", "system"):
        if (value := getattr(wanted, field)) and value != getattr(mine, field):
            body[field] = value
    before, after = mine.parameter_map(), wanted.parameter_map()
    parameters: dict[str, Any] = {key: value for key, value in after.items() if value != before.get(key)}
    if "stop" in before and "stop" not in after:
        parameters["stop"] = []
    if parameters:
        body["parameters"] = parameters
    if wanted.licenses and not mine.licenses:
        body["license"] = list(wanted.licenses)
    return body


async def _back_up(client: OllamaClient, facts: Facts) -> str:
    """The first copy of these weights is kept: repairing twice must not lose what was there before."""
    backup = backup_name(facts.name)
    shown = await find_show(client, backup)
    if shown is not None:
        kept = await look_at(client, backup, facts.version)
        if kept.layer == facts.layer:
            return backup
        raise ConflictError(
            f"{backup}: holds other weights than {facts.name} has now, so no copy can be kept there",
            remedy=f"`ollama rm {backup}`, if nobody needs it any more",
        )
    await client.copy(facts.name, backup)
    return backup


async def _nothing_done(
    client: OllamaClient, facts: Facts, source: Facts | None, ill: list[Finding], start: float
) -> Repaired:
    """Nothing a manifest could change: say so, or say that a base is missing."""
    if source is None and any(finding.key in _CURABLE for finding in ill):
        raise ModelError(
            f"{facts.name}: what it lost must come from a model of its kind, and this engine has none",
            remedy="Pull its base and name it: `abliterate repair MODEL --from BASE`",
        )
    return Repaired(
        model=facts.name,
        base=source.name if source else "",
        seconds=round(time.monotonic() - start, 3),
        diagnosis=await diagnose(client, facts.name, source.name if source else ""),
    )


def _told(before: Modelfile, after: Modelfile, was: Facts, now: Facts) -> list[str]:
    told: list[str] = []
    if was.template != now.template:
        told.append("TEMPLATE: the base's" if now.template else "TEMPLATE: taken away")
    for field in ("renderer", "parser", "requires"):
        one, other = getattr(before, field), getattr(after, field)
        if one != other:
            told.append(f"{field.upper()}: {other or 'taken away'}")
    old, new = before.parameter_map(), after.parameter_map()
    told += [
        f"PARAMETER {key}: {new.get(key, 'taken away')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    for field, word in (("system", "SYSTEM"), ("licenses", "LICENSE"), ("messages", "MESSAGE")):
        if getattr(before, field) != getattr(after, field):
            told.append(f"{word}: the base's")
    gained = sorted(now.capabilities - was.capabilities)
    return told + ([f"now able to: {', '.join(gained)}"] if gained else [])


def _cuts(key: str, value: object) -> bool:
    return key == "stop" and str(value).strip() in MARKERS


def _kind(facts: Facts) -> str:
    return " ".join(filter(None, (facts.architecture, str(facts.details.get("parameter_size") or ""))))
