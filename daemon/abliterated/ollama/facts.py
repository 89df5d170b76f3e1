"""All that can be learnt of a model in an engine without loading it: what `/api/show` says and, where its file is here,
the template inside. And which other model of the engine it was probably made from.

Does not know what of it is wrong: that is `doctor`'s.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abliterate.contract.errors import EngineRefused, ModelError, NotFound, RecipeError
from abliterate.contract.names import parse_name
from abliterated.ollama.client import OllamaClient
from abliterated.ollama.header import TEMPLATE, read_keys
from abliterated.ollama.locate import base_from_show, how_to_have
from abliterated.ollama.modelfile import NO_TEMPLATE, Modelfile
from abliterated.ollama.request import blob_digest, is_jinja
from abliterated.ollama.version import Version

BASE_NAME = "abliterated.base.name"
_MOST_ASKED = 40  # models looked at in search of a base
_DERIVED = frozenset({"abliterated", "uncensored", "heretic", "unrestricted", "decensored", "derestricted"})


@dataclass(frozen=True)
class Facts:
    """`jinja`: the template inside the GGUF, "" where it has none, None where nobody can tell. `template`: the Go
    template that counts, "" for none or the dummy. `dummy`: the dummy is what the engine uses."""

    name: str
    version: Version
    modelfile: Modelfile
    capabilities: frozenset[str]
    architecture: str = ""
    parameters: int = 0
    jinja: str | None = None
    dummy: bool = False
    content: str = ""
    made_from: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    size: int = 0

    @property
    def template(self) -> str:
        said = self.modelfile.template or ""
        return "" if said.strip() in ("", NO_TEMPLATE) or is_jinja(said) else said

    @property
    def layer(self) -> str:
        return blob_digest(self.modelfile.models[0]) if self.modelfile.models else ""


async def look_at(client: OllamaClient, name: str, version: Version | None = None) -> Facts:
    """What is known of a model. Raises NotFound, and ModelError for one that has no GGUF."""
    short = parse_name(name).short()
    try:
        show = await client.show(short)
    except NotFound as error:
        raise NotFound(
            f"{short}: the engine at {client.url} has no such model", remedy=await how_to_have(client, short)
        ) from error
    known = version or await client.version()
    return await asyncio.to_thread(facts_of, short, show, known, client.local)


def facts_of(name: str, show: Mapping[str, Any], version: Version, local: bool) -> Facts:
    """Read a `/api/show` answer, and the GGUF's header where its file is here. Blocking. Raises ModelError."""
    base = base_from_show(name, show)
    info = show.get("model_info")
    keys: Mapping[str, Any] = info if isinstance(info, Mapping) else {}
    shown = str(show.get("template") or "")
    jinja = _inner_template(base.blob_path) if local else None
    if jinja is None and is_jinja(shown):
        jinja = shown
    return Facts(
        name=name,
        version=version,
        modelfile=base.modelfile,
        capabilities=base.capabilities,
        architecture=str(keys.get("general.architecture") or base.details.get("family") or ""),
        parameters=_count(keys.get("general.parameter_count")),
        jinja=jinja,
        dummy=shown.strip() == NO_TEMPLATE,
        content=base.content,
        made_from=str(keys.get(BASE_NAME) or "").removeprefix("ollama:"),
        details=base.details,
    )


async def find_base(client: OllamaClient, facts: Facts) -> Facts | None:
    """The model of this engine that `facts` was probably made from, by what it says, else by architecture and size.

    Guessed only where a name is shared and nothing would be lost by it: a wrong guess would repair a model to death.
    Of several the one that can most, then the one whose name is nearest. None where there is no candidate.
    """
    for said in (facts.made_from, str(facts.details.get("parent_model") or "")):
        if said and not re.search(r"[\\/]blobs[\\/]|sha256[-:]", said):
            found = await _try(client, said, facts)
            if found is not None and found.name != facts.name:
                return found
    if not facts.architecture:
        return None
    candidates: list[Facts] = []
    words = _words(facts.name)
    for row in _plausible(await client.tags(), facts)[:_MOST_ASKED]:
        other = await _try(client, row, facts) if words & _words(row) and not _DERIVED & _parts(row) else None
        if other is None or other.content or other.layer == facts.layer:
            continue
        if same_kind(facts, other) and other.capabilities >= facts.capabilities:
            candidates.append(other)
    candidates.sort(key=lambda other: (-len(other.capabilities), -len(words & _words(other.name)), len(other.name)))
    return candidates[0] if candidates else None


def same_kind(one: Facts, other: Facts) -> bool:
    """Of one architecture and one size: the same layers with other weights."""
    if one.architecture != other.architecture:
        return False
    if one.parameters and other.parameters:
        return abs(one.parameters - other.parameters) <= 0.02 * one.parameters
    return one.details.get("parameter_size") == other.details.get("parameter_size")


def _plausible(rows: list[dict[str, Any]], facts: Facts) -> list[str]:
    """Names of the models whose listing doesn't rule them out, so that few are asked about."""
    family, size = facts.details.get("family"), facts.details.get("parameter_size")
    found = []
    for row in rows:
        raw = row.get("details")
        details: Mapping[str, Any] = raw if isinstance(raw, Mapping) else {}
        name = str(row.get("name") or "")
        if not name or name == facts.name or "-before-repair" in name:
            continue
        if family and details.get("family") not in (None, "", family):
            continue
        if size and details.get("parameter_size") not in (None, "", size):
            continue
        found.append(name)
    return found


async def _try(client: OllamaClient, name: str, like: Facts) -> Facts | None:
    try:
        return await look_at(client, name, like.version)
    except (NotFound, ModelError, EngineRefused, RecipeError):  # the last: a name of another place
        return None


def _inner_template(path: Path) -> str | None:
    try:
        keys = read_keys(path, (TEMPLATE,))
    except ModelError:
        return None
    return str(keys.get(TEMPLATE, ""))


def _words(name: str) -> set[str]:
    """The words of the model's own part of a name, without those that say what was done to it."""
    return _parts(name.rpartition("/")[2].partition(":")[0]) - _DERIVED


def _parts(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9.]+", name.lower())) - {""}


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0
