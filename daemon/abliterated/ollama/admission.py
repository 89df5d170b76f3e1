"""A product gets its name only when it has been proven: registered under a provisional name, certified, then renamed.

So a model under the name people use is always a certified one. What fails is removed again, the job keeps the GGUF and
the certificate with its diffs, and an earlier model of that name stays untouched. Every step looks before it acts:
whatever was interrupted, the next try ends with exactly one model, and none of ours beside it.

Does not know jobs, nor when to try again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path

import msgspec

from abliterate.contract.errors import ConflictError, EngineRefused, EngineUnavailable, ModelError, NotFound
from abliterate.contract.names import ModelName, parse_name
from abliterated.ollama.certification import certify_apart
from abliterated.ollama.certify import Certificate
from abliterated.ollama.client import OllamaClient, Report
from abliterated.ollama.header import TEMPLATE, known_keys
from abliterated.ollama.locate import Base
from abliterated.ollama.modelfile import Modelfile
from abliterated.ollama.register import (
    Registration,
    check_version,
    find_show,
    name_taken,
    register,
    registered,
    shown_content,
)

log = logging.getLogger(__name__)

PROVISIONAL, REPLACED = "-uncertified", "-replaced"


class CertificationFailed(EngineRefused):
    """The new model behaves otherwise than its base; it was removed again. `certificate` says how."""

    def __init__(self, message: str, certificate: Certificate, *, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.certificate = certificate
        self.result: object = None  # what the job shall keep, if its owner says so


@dataclass(frozen=True)
class Admission:
    """What was registered, and the proof."""

    registration: Registration
    certificate: Certificate


def beside(name: str, suffix: str) -> str:
    """`name` with a suffix on its tag: the size in it stays, by which some engines choose a renderer."""
    full = parse_name(name)
    return ModelName(full.host, full.namespace, full.model, full.tag[: 80 - len(suffix)] + suffix).short()


async def check_name(client: OllamaClient, target: str, *, replace: bool) -> None:
    """Before hours of work: may the product have that name, on that engine? Raises ConflictError, EngineRefused."""
    await check_version(client)
    name = parse_name(target).short()
    shown = await find_show(client, name)
    if shown is not None and not replace and not await asyncio.to_thread(shown_content, shown):
        raise name_taken(name)


async def admit(
    client: OllamaClient,
    product: Path,
    target: str,
    base: Base | None = None,
    *,
    reference: str = "",
    replace: bool = False,
    digest: str = "",
    modelfile: Modelfile | None = None,
    report: Report | None = None,
) -> Admission:
    """Register `product` as `target` and prove it against `reference` (a model of the same engine, "" for none).

    Raises CertificationFailed, ConflictError, ModelError, EngineRefused; EngineUnavailable and DiskError where a
    later try may succeed.
    """
    name = parse_name(target).short()
    helpers = _Helpers(client, beside(name, PROVISIONAL), beside(name, REPLACED))
    baked = await asyncio.to_thread(_baked, product, base)
    there = await registered(client, product, name, base, digest=digest, modelfile=modelfile)
    if there is not None:
        await helpers.clear()
        certificate = await certify_apart(client.url, name, reference, product=product, baked=baked)
        if certificate.failures:
            raise _failed(name, certificate, "it was there already and is left as it is")
        return Admission(there, certificate)

    await check_name(client, name, replace=replace)
    done = await register(client, product, helpers.provisional, base, digest=digest, modelfile=modelfile, report=report)
    helpers.made = True
    try:
        certificate = await _prove_and_name(
            client, helpers, name, done, reference, product, baked=baked, replace=replace
        )
    except (ConflictError, EngineRefused, ModelError, NotFound):
        await helpers.clear()
        raise
    await helpers.clear()
    await asyncio.to_thread(os.sync)
    log.info("%s: certified and named", name, extra={"action": "register.admitted", "model": name})
    return Admission(changed(done, name=name), msgspec.structs.replace(certificate, model=name))


async def clear(client: OllamaClient, target: str) -> None:
    """Take away what an interrupted `admit` left at its passing names, if it is ours."""
    name = parse_name(target).short()
    await _Helpers(client, beside(name, PROVISIONAL), beside(name, REPLACED)).clear()


async def _prove_and_name(
    client: OllamaClient,
    helpers: _Helpers,
    name: str,
    done: Registration,
    reference: str,
    product: Path,
    *,
    baked: bool,
    replace: bool,
) -> Certificate:
    certificate = await certify_apart(client.url, helpers.provisional, reference, product=product, baked=baked)
    if certificate.failures:
        raise _failed(name, certificate, "it was not given its name")
    await check_name(client, name, replace=replace)
    await helpers.rename(name)
    if await _content_of(client, name) != done.content:
        raise EngineUnavailable(
            f"{name}: the engine shows other weights than the ones registered",
            remedy="Something else wrote that name at the same time; it is tried again",
        )
    return certificate


@dataclass
class _Helpers:
    """The two names beside the real one, for seconds: `provisional` until it is proven, `replaced` for what had it."""

    client: OllamaClient
    provisional: str
    replaced: str
    made: bool = False
    kept: bool = False

    async def rename(self, name: str) -> None:
        """Manifests only. What had the name is kept beside it: deleting it then lets the engine free its blobs."""
        had_it = await find_show(self.client, name) is not None
        if had_it and await self._free(self.replaced):
            await self.client.copy(name, self.replaced)
            self.kept = True
        try:
            await self.client.copy(self.provisional, name)
        except NotFound as error:
            raise EngineUnavailable(
                f"{self.provisional}: is gone before it was given its name", remedy="It is registered again"
            ) from error

    async def clear(self) -> None:
        """Both go, if they are ours: left by an earlier try they have our key."""
        for name in (self.provisional, self.replaced):
            of_this_try = self.made if name == self.provisional else self.kept
            if of_this_try or await _content_of(self.client, name):
                with contextlib.suppress(NotFound):
                    await self.client.delete(name)

    async def _free(self, name: str) -> bool:
        return await find_show(self.client, name) is None or bool(await _content_of(self.client, name))


async def _content_of(client: OllamaClient, name: str) -> str:
    shown = await find_show(client, name)
    return await asyncio.to_thread(shown_content, shown) if shown is not None else ""


def _failed(name: str, certificate: Certificate, outcome: str) -> CertificationFailed:
    first, others = certificate.failures[0], len(certificate.failures) - 1
    more = f" and {others} more" if others else ""
    return CertificationFailed(
        f"{name}: not as its base: {first.what}: {first.text}{more}; {outcome}",
        certificate,
        remedy="The report shows the difference (`abliterate status ID`); the GGUF is kept with the job",
    )


def _baked(product: Path, base: Base | None) -> bool:
    """Does the product's GGUF hold another chat template than the base's file? Only where both can be read here."""
    if base is None:
        return False
    before = known_keys(base.blob_path, (TEMPLATE,))
    return bool(before) and before.get(TEMPLATE) != known_keys(product, (TEMPLATE,)).get(TEMPLATE)
