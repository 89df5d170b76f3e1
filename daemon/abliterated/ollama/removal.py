"""A model of our making taken away again, and what space that gave back; and the list of all of them.

Ours is what shows the key `abliterated.content`: it is in the GGUF, so it also marks what a user copied or renamed.
Does not know the journal, which alone knows the names we gave.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abliterate.contract.care import ModelRow, Models, Undone
from abliterate.contract.errors import ConflictError, NotFound, RecipeError
from abliterate.contract.names import parse_name
from abliterated.ollama.client import OllamaClient
from abliterated.ollama.facts import BASE_NAME
from abliterated.ollama.modelfile import from_show
from abliterated.ollama.register import find_show, shown_content
from abliterated.ollama.repair import backup_name
from abliterated.ollama.request import blob_digest

_AT_ONCE = 4


async def undo(client: OllamaClient, name: str) -> Undone:
    """Remove `name`, and the copy a repair of it left. Raises NotFound; ConflictError for what we did not make."""
    short = parse_name(name).short()
    shown = await find_show(client, short)
    if shown is None:
        raise NotFound(
            f"{short}: the engine at {client.url} has no such model", remedy="`abliterate models` lists ours"
        )
    content = await asyncio.to_thread(shown_content, shown)
    backup = backup_name(short)
    if not content:
        back = await find_show(client, backup) is not None
        raise ConflictError(
            f"{short}: was not made by abliterated, so it is not ours to remove",
            remedy=f"`abliterate repair {short} --back` undoes a repair" if back else f"`ollama rm {short}` removes it",
        )
    blobs = await _blobs(client, short, shown)
    removed = [short]
    await client.delete(short)
    left = await find_show(client, backup)
    if left is not None and await asyncio.to_thread(shown_content, left) == content:
        blobs |= await _blobs(client, backup, left)
        await client.delete(backup)
        removed.append(backup)
    gone = {digest: size for digest, size in blobs.items() if not await client.has_blob(digest)}
    kept = await holders(client, set(blobs) - set(gone)) if len(gone) < len(blobs) else {}
    notes: list[str] = []
    if len(gone) < len(blobs) and not kept:
        notes.append("the engine still has its blobs; it clears them away when it is started next")
    await asyncio.to_thread(os.sync)
    return Undone(model=short, removed=removed, freed=sum(gone.values()), kept_by=sorted(kept), notes=notes)


async def holders(client: OllamaClient, digests: set[str]) -> set[str]:
    """The models that hold one of these blobs."""
    found: set[str] = set()
    for name, show in (await _shows(client)).items():
        if {blob_digest(path) for path in _paths(show)} & digests:
            found.add(name)
    return found


async def list_ours(client: OllamaClient) -> Models:
    """Every model of our making, with its base's size where the engine has that still."""
    rows = {str(row.get("name")): row for row in await client.tags()}
    shows = await _shows(client, list(rows))
    found: list[ModelRow] = []
    for name, show in sorted(shows.items()):
        raw = show.get("model_info")
        info: Mapping[str, Any] = raw if isinstance(raw, Mapping) else {}
        content = await asyncio.to_thread(shown_content, show)
        if not content:
            continue
        base = str(info.get(BASE_NAME) or "")
        there = rows.get(_short(base.removeprefix("ollama:")))
        details = show.get("details")
        found.append(
            ModelRow(
                name=name,
                base=base,
                size=_size(rows[name]),
                base_size=_size(there) if there else 0,
                base_there=there is not None,
                quantization=str(details.get("quantization_level") or "") if isinstance(details, Mapping) else "",
                refusal_before=_share(info.get("abliterated.metric.refusal_before")),
                refusal_after=_share(info.get("abliterated.metric.refusal_after")),
                modified=str(rows[name].get("modified_at") or ""),
                content=content,
            )
        )
    return Models(models=found, others=len(rows) - len(found))


async def _shows(client: OllamaClient, names: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """What the engine says of each of its models, a few asked at a time."""
    asked = names if names is not None else [str(row.get("name")) for row in await client.tags()]
    turn = asyncio.Semaphore(_AT_ONCE)

    async def one(name: str) -> dict[str, Any] | None:
        async with turn:
            return await find_show(client, name)

    found = await asyncio.gather(*map(one, asked))
    return {name: show for name, show in zip(asked, found, strict=True) if show is not None}


async def _blobs(client: OllamaClient, name: str, show: Mapping[str, Any]) -> dict[str, int]:
    """The large blobs of a model, with their sizes where the files are here."""
    found: dict[str, int] = {}
    for path in _paths(show):
        if digest := blob_digest(path):
            found[digest] = await asyncio.to_thread(_file_size, Path(path)) if client.local else 0
    if found and not any(found.values()):  # elsewhere: the listing knows the size of all layers together
        for row in await client.tags():
            if str(row.get("name")) == name:
                found[next(iter(found))] = _size(row)
    return found


def _paths(show: Mapping[str, Any]) -> list[str]:
    said = from_show(show)
    return [*said.models, *said.adapters, *said.drafts]


def _file_size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _size(row: Mapping[str, Any]) -> int:
    size = row.get("size")
    return size if isinstance(size, int) else 0


def _share(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _short(name: str) -> str:
    try:
        return parse_name(name).short()
    except RecipeError:
        return name
