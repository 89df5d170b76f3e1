"""A finished GGUF becomes a model in the engine: blob, creation with all the base says, proof.

Every step looks before it acts, so running it again after any interruption ends in exactly one correct model; a model
of that name that we did not make is never overwritten unless asked. Does not know jobs, nor when to try again: it
raises EngineUnavailable where that would help.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

from abliterate.contract.errors import ConflictError, EngineRefused, EngineUnavailable, ModelError, NotFound
from abliterate.contract.names import parse_name
from abliterated.ollama import request, store
from abliterated.ollama.aside import aside
from abliterated.ollama.client import OllamaClient, Report, hash_file
from abliterated.ollama.header import CONTENT, TEMPLATE, known_keys, read_keys
from abliterated.ollama.locate import Base
from abliterated.ollama.modelfile import Modelfile, from_show
from abliterated.ollama.request import Digests, blob_digest
from abliterated.ollama.version import Generation, Version

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Registration:
    """What was registered. `digest`: of the file; `layer`: of what the engine made of it; `notes`: every difference.

    `existing`: the very same model was there already, nothing was sent. `linked`: no byte of the blob was copied.
    """

    name: str
    digest: str
    layer: str
    content: str
    existing: bool = False
    linked: bool = False
    capabilities: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Plan:
    """What shall be there in the end."""

    target: str
    product: Path
    modelfile: Modelfile
    base: Base | None
    content: str
    version: Version
    digest: str = ""
    notes: list[str] = field(default_factory=list)

    def digests(self) -> Digests:
        said = self.base.modelfile if self.base else Modelfile()

        def known(paths: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(digest for path in paths if (digest := blob_digest(path)))

        return Digests(self.digest, known(said.models[1:]), known(said.adapters), known(said.drafts))


async def register(
    client: OllamaClient,
    product: Path,
    target: str,
    base: Base | None = None,
    *,
    replace: bool = False,
    digest: str = "",
    modelfile: Modelfile | None = None,
    report: Report | None = None,
) -> Registration:
    """Register `product` as `target`, with the template, parameters and all else of `base`.

    `digest`: the file's, where it is known already. `modelfile`: instead of the base's (`template_from`).
    Raises ConflictError, ModelError, EngineRefused; EngineUnavailable and DiskError where a later try may succeed.
    """
    plan = await _plan(client, product, target, base, digest, modelfile)
    name = plan.target
    before = await find_show(client, name)
    if before is not None:
        theirs = await asyncio.to_thread(shown_content, before)
        if not theirs and not replace and not await _same_file(plan, before):
            raise name_taken(name)
        if theirs and theirs == plan.content and await asyncio.to_thread(_as_wanted, plan, before):
            logger.info("registered already", extra={"action": "register.existing", "model": name})
            return await _finished(plan, before, existing=True, linked=False)

    linked, plan = await _bring_blobs(client, plan, report)
    await client.create(request.create_request(name, plan.modelfile, plan.digests()), report)
    after = await find_show(client, name)
    if after is None:
        raise EngineUnavailable(
            f"{name}: the engine said success, but has no such model", remedy="It is safe to run again"
        )
    return await _finished(plan, after, existing=False, linked=linked)


async def registered(
    client: OllamaClient,
    product: Path,
    target: str,
    base: Base | None = None,
    *,
    digest: str = "",
    modelfile: Modelfile | None = None,
) -> Registration | None:
    """The registration where the very same model is there already; None where `register` would have work to do."""
    plan = await _plan(client, product, target, base, digest, modelfile)
    there = await find_show(client, plan.target)
    if there is None or not plan.content or await asyncio.to_thread(shown_content, there) != plan.content:
        return None
    if not await asyncio.to_thread(_as_wanted, plan, there):
        return None
    return await _finished(plan, there, existing=True, linked=False)


def name_taken(name: str) -> ConflictError:
    """A model of that name is there, and not of our making."""
    return ConflictError(
        f"{name}: a model of that name is there already, and we did not make it",
        remedy="Choose another `name`, or set `replace = true`",
    )


async def check_version(client: OllamaClient) -> Version:
    """Which engine answers. Raises EngineRefused for one too old to register with."""
    version = await client.version()
    if version.too_old:
        raise EngineRefused(
            f"Ollama {version.text} at {client.url} is too old to register with", remedy="Update it to 0.5 or newer"
        )
    return version


async def _plan(
    client: OllamaClient, product: Path, target: str, base: Base | None, digest: str, modelfile: Modelfile | None
) -> _Plan:
    name = parse_name(target).short()
    version = await check_version(client)
    keys = await asyncio.to_thread(read_keys, product, (CONTENT, TEMPLATE))
    carried, notes = request.carried(modelfile or (base.modelfile if base else Modelfile()))
    jinja = str(keys.get(TEMPLATE, ""))
    alone = base is None and modelfile is None and version.generation is Generation.LEGACY
    if alone and jinja and (template := await asyncio.to_thread(go_template, jinja)):
        carried = changed(carried, template=template)
        lost = request.shows_tools(jinja) and ".Tools" not in template
        notes.append(
            f"Ollama {version.text} ignores the template inside the GGUF: it got a Go template that says the same"
            + (", but for tools: these will not work there; Ollama 0.30 or newer has them" if lost else "")
        )
    plan = _Plan(name, product, carried, base, str(keys.get(CONTENT, "")), version, digest, version.notes() + notes)
    plan.notes.extend(_template_notes(plan, jinja))
    return plan


def go_template(jinja: str) -> str:
    """A Go template that says what this Jinja says, "" where none is known. Blocking."""
    from abliterated.ollama import templates

    known = getattr(templates, "go_template_for", None)
    return (known(jinja) or "") if known else ""


async def _bring_blobs(client: OllamaClient, plan: _Plan, report: Report | None) -> tuple[bool, _Plan]:
    """Every blob the creation names is in the engine's store; True where the product cost no copy."""
    folder = await _store(client, plan.base)
    digest, linked = plan.digest, False
    if folder is not None or not digest:
        # A link is believed by its name, so its digest is computed here and not taken from anyone.
        digest = await aside(hash_file, plan.product, report)
        if plan.digest and digest != plan.digest:
            raise ModelError(
                f"{plan.product}: its content changed after it was made", remedy="Run the recipe again: `retry`"
            )
    present = await client.has_blob(digest)
    if folder is not None:
        there = await asyncio.to_thread(_size, store.blob_path(folder, digest))
        if there != await asyncio.to_thread(_size, plan.product):  # missing, or cut off: the engine can't tell
            linked = await asyncio.to_thread(store.link, plan.product, digest, folder)
            present = await client.has_blob(digest)
            if linked and not present:  # another engine's store lies at the same path here
                await asyncio.to_thread(store.unlink, digest, folder)
    if not present:
        linked = False
        await client.push_blob(plan.product, digest, report)
    plan = changed(plan, digest=digest)
    said = plan.base.modelfile if plan.base else Modelfile()
    for path in (*said.models[1:], *said.adapters, *said.drafts):
        await _bring_companion(client, path)
    return linked, plan


async def _bring_companion(client: OllamaClient, path: str) -> None:
    """A projector, adapter or draft of the base: normally in the engine already."""
    digest = blob_digest(path)
    if digest and not await client.has_blob(digest):
        if not await asyncio.to_thread(Path(path).is_file):
            raise ModelError(
                f"{path}: the base needs this blob and the engine has it no more", remedy="`ollama pull` the base again"
            )
        await client.push_blob(Path(path), digest)


async def _store(client: OllamaClient, base: Base | None) -> Path | None:
    """The engine's own blob folder, where it is here and writable."""
    if not client.local:
        return None
    if base is not None:
        return await asyncio.to_thread(store.blobs_folder, base.blob_path)
    for row in (await client.tags())[:8]:  # any local model shows where the store is
        show = await find_show(client, str(row.get("name", "")))
        models = from_show(show).models if show else ()
        if models and blob_digest(models[0]):
            return await asyncio.to_thread(store.blobs_folder, Path(models[0]))
    return None


async def _finished(plan: _Plan, show: Mapping[str, Any], *, existing: bool, linked: bool) -> Registration:
    """Prove that what the engine shows is the product; the rest becomes notes. Raises EngineRefused otherwise."""
    found = from_show(show)
    layer = blob_digest(found.models[0]) if found.models else ""
    content = await asyncio.to_thread(shown_content, show)
    notes = list(plan.notes)
    if content != plan.content:
        if content or (layer and plan.digest and layer != plan.digest):
            raise EngineRefused(
                f"{plan.target}: the engine shows other weights than the ones registered",
                remedy="Something else wrote that name at the same time; run it again",
            )
        notes.append("the engine does not show the key abliterated.content: identity rests on the blob's digest")
    if layer and plan.digest and layer != plan.digest and plan.version.keeps_gguf:
        notes.append(f"the engine wrote the GGUF anew: its layer is {layer[:19]}…")
    capabilities = tuple(map(str, show.get("capabilities") or ()))
    if plan.base is not None:
        notes += request.capability_notes(plan.base.capabilities, capabilities)
    notes += request.differences(plan.modelfile, found)
    await asyncio.to_thread(os.sync)
    return Registration(
        name=plan.target,
        digest=plan.digest,
        layer=layer,
        content=content,
        existing=existing,
        linked=linked,
        capabilities=capabilities,
        notes=tuple(notes),
    )


def _as_wanted(plan: _Plan, show: Mapping[str, Any]) -> bool:
    """Is what is there already what a registration would make? Then there is nothing to do. Blocking."""
    if not plan.content:
        return False
    found = from_show(show)
    size = _size(Path(found.models[0])) if found.models else -1
    if plan.version.keeps_gguf and size >= 0 and size != _size(plan.product):
        return False
    expected = request.differences(plan.modelfile, found)
    # What an engine adds by itself it would add again.
    return not [note for note in expected if not note.startswith("TEMPLATE: the engine added")]


async def _same_file(plan: _Plan, show: Mapping[str, Any]) -> bool:
    """A model without our key whose layer is the very product: a registration of ours whose key was not shown."""
    models = from_show(show).models
    layer = blob_digest(models[0]) if models else ""
    return bool(layer) and layer == (plan.digest or await aside(hash_file, plan.product))


def _template_notes(plan: _Plan, jinja: str) -> list[str]:
    """What a user must hear of the chat template before it disappoints."""
    said = plan.modelfile
    if said.renderer or said.parser or (said.template and said.template.strip()):
        return []
    if not jinja:
        return ["neither the GGUF nor the base has a chat template: the model continues text, it does not chat"]
    if plan.version.generation is Generation.LEGACY:
        return [
            f"Ollama {plan.version.text} ignores the template inside the GGUF and no Go template is known for this "
            "model: tools will not work there, and turns may be ill-formed; Ollama 0.30 or newer does it right"
        ]
    return []


async def find_show(client: OllamaClient, name: str) -> dict[str, Any] | None:
    """All about one model; None where there is none."""
    try:
        return await client.show(name)
    except NotFound:
        return None


def shown_content(show: Mapping[str, Any]) -> str:
    """Our key as the engine shows it; where it doesn't, as the file says, if the file is here."""
    shown = request.content_of(show)
    if shown:
        return shown
    models = from_show(show).models
    if not models or not blob_digest(models[0]):
        return ""
    return str(known_keys(Path(models[0]), (CONTENT,)).get(CONTENT, ""))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
