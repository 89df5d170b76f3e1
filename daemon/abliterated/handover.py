"""Between a job and the engine: what its base is, room on the device, the product handed over, certified and reported.

Part of the wiring: joins the rooms `jobs` and `ollama` without their knowing each other. Does not know the spool,
the proxy's insides or the control API.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from abliterate.contract.errors import AbliteratedError, EngineRefused, EngineUnavailable, NotFound
from abliterate.contract.messages import Result
from abliterate.contract.recipe import Recipe
from abliterated.files import write_whole
from abliterated.jobs.journal import Job
from abliterated.report import redraw

log = logging.getLogger(__name__)

BASE_FILE = "base.json"  # in the job's folder: what the engine said of the base before the job began
REPORT_FILE = "report.json"
CERTIFICATIONS = 3  # that end with no word, before the job does
_KEPT = ("modelfile", "parameters", "template", "system", "license", "messages", "capabilities", "details", "requires")


class Handover:
    """One engine's side of every job. `busy`: whether requests are being answered now; `left`: the file that remembers,
    through a restart, what could not be taken away."""

    def __init__(self, upstream: str, busy: Callable[[], bool], left: Path | None = None) -> None:
        self._upstream = upstream
        self._busy = busy
        self._evicted: dict[str, list[Any]] = {}
        self._unfinished: dict[str, int] = {}  # certifications that came to no end, by job
        # Names whose passing models could not be taken away when their jobs were cancelled.
        self._left_file = left
        self._left: set[str] = _remembered_left(left)
        self._clearing = asyncio.Lock()

    async def base(self, recipe: Recipe, target: str, folder: Path) -> tuple[str, str]:
        """File and digest of the recipe's base; what the engine says of it is kept in `folder`.

        The product's name is asked for too, before hours of work. Raises EngineUnavailable, NotFound, ModelError,
        ConflictError, EngineRefused.
        """
        from abliterated.ollama.admission import check_name
        from abliterated.ollama.client import OllamaClient
        from abliterated.ollama.locate import resolve_base

        async with OllamaClient(self._upstream) as client:
            await self._clear_left(client)
            source, digest = ("" if recipe.model.startswith("hf:") else recipe.model), ""
            if recipe.model.startswith("ollama:"):
                base = await resolve_base(client, recipe.model.removeprefix("ollama:"))
                source, digest = str(base.blob_path), base.digest
                await asyncio.to_thread(_remember, folder, await client.show(base.name))
            if recipe.export.register and recipe.export.format == "gguf":
                with contextlib.suppress(EngineUnavailable):  # only handing over needs it, and that can wait
                    await check_name(client, target, replace=recipe.replace)
        return source, digest

    async def make_room(self, job_id: str) -> None:
        """The device's memory, from an engine that shares it with us. `release` undoes it."""
        from abliterated.ollama.client import OllamaClient
        from abliterated.ollama.politeness import make_room

        async with OllamaClient(self._upstream) as client:
            if client.local:
                self._evicted[job_id] = await make_room(client, busy=self._busy)

    async def release(self, job: Job) -> None:
        """The job has left the device: what was loaded for ever is loaded again."""
        from abliterated.ollama.client import OllamaClient
        from abliterated.ollama.politeness import restore

        if evicted := self._evicted.pop(job.id, []):
            async with OllamaClient(self._upstream) as client:
                await restore(client, evicted)

    async def abandon(self, job: Job) -> None:
        """The job was cancelled while it was handed over: what bears a passing name of ours goes. Never raises ours."""
        from abliterated.ollama.admission import clear
        from abliterated.ollama.client import OllamaClient

        try:
            async with OllamaClient(self._upstream) as client:
                await clear(client, job.target)
        except AbliteratedError as error:
            self._left.add(job.target)
            await self._remember_left()
            log.warning(
                "%s: something may be left until the engine is asked again (%s)",
                job.target,
                error,
                extra={"action": "register.abandon"},
            )
        self._unfinished.pop(job.id, None)

    async def _clear_left(self, client: Any) -> None:
        """What a cancelled job had to leave goes now that the engine is asked again. Never raises ours."""
        from abliterated.ollama.admission import clear

        async with self._clearing:
            for target in sorted(self._left):
                try:
                    await clear(client, target)
                except AbliteratedError:
                    return  # at the next contact, then
                self._left.discard(target)
                await self._remember_left()
                log.info("%s: nothing of the cancelled job is left", target, extra={"action": "register.abandon"})

    async def _remember_left(self) -> None:
        if self._left_file is None:
            return
        try:
            await asyncio.to_thread(write_whole, self._left_file, json.dumps(sorted(self._left)).encode(), 0o640)
        except OSError as error:
            log.warning(
                "%s: can't be written (%s)", self._left_file, error.strerror, extra={"action": "register.abandon"}
            )

    async def _give_up(self, job: Job, error: AbliteratedError) -> None:
        """A certification came to no end, again. Raises EngineRefused after the last try; before it, returns."""
        self._unfinished[job.id] = tries = self._unfinished.get(job.id, 0) + 1
        if tries < CERTIFICATIONS:
            return
        await self.abandon(job)
        raise EngineRefused(
            f"{error.message}, {tries} times; it was not given its name",
            remedy="See the engine's log; the GGUF is kept with the job, and `abliterate retry` tries again",
        ) from error

    async def register(self, job: Job, result: Result, out: Path) -> Result:
        """Hand the product to the engine and prove it; the result with what a person should know.

        A failed certification's error carries the result too; one that comes to no end is tried CERTIFICATIONS times.
        Raises what `admission.admit` raises.
        """
        from abliterated.ollama.admission import CertificationFailed, admit
        from abliterated.ollama.certification import CertificationUnfinished
        from abliterated.ollama.client import OllamaClient
        from abliterated.ollama.locate import describe_base

        recipe, notes = job.recipe, []
        async with self._clearing:
            if job.target in self._left:  # what bears its passing names is this job's from now on
                self._left.discard(job.target)
                await self._remember_left()
        async with OllamaClient(self._upstream) as client:
            await self._clear_left(client)
            base, reference = None, ""
            if recipe.model.startswith("ollama:"):
                name = recipe.model.removeprefix("ollama:")
                try:
                    base = await describe_base(client, name)
                    reference = base.name
                except NotFound:
                    base = await asyncio.to_thread(_remembered, name, out.parent)
                    if base is None:
                        raise
                    notes.append(f"{base.name} is gone from the engine: what it said before the job began was used")
            modelfile = None
            if recipe.export.template_from:
                other = await describe_base(client, recipe.export.template_from.removeprefix("ollama:"))
                modelfile, reference = other.modelfile, other.name
            try:
                done = await admit(
                    client,
                    out / result.product,
                    job.target,
                    base,
                    reference=reference,
                    replace=recipe.replace,
                    digest=f"sha256:{result.digest}" if result.digest else "",
                    modelfile=modelfile,
                )
            except CertificationFailed as error:
                failed = with_certificate(result, error.certificate, notes)
                await asyncio.to_thread(report_certification, out, failed.certification)
                error.result = failed
                raise
            except CertificationUnfinished as error:
                await self._give_up(job, error)
                raise
        self._unfinished.pop(job.id, None)
        proven = with_certificate(result, done.certificate, [*notes, *done.registration.notes])
        await asyncio.to_thread(report_certification, out, proven.certification)
        return proven


def with_certificate(result: Result, certificate: Any, notes: list[str]) -> Result:
    """The result with the certificate and, in words, what it says."""
    told = [*notes, *certificate.notes]
    told += [f"certification: {one.what}: {one.text}" for one in certificate.differences]
    plain: dict[str, Any] = msgspec.to_builtins(certificate)
    kept = list(dict.fromkeys([*result.notes, *told]))
    return msgspec.structs.replace(result, notes=kept, certification=plain)


def report_certification(out: Path, certification: Mapping[str, Any]) -> None:
    """Write it into the job's report. Blocking; a report that can't be read or written is left and said in the log."""
    path = out / REPORT_FILE
    try:
        report = json.loads(path.read_bytes()) if path.exists() else {}
        report["certification"] = dict(certification)
        write_whole(path, json.dumps(report, indent=2, ensure_ascii=False).encode() + b"\n", mode=0o640)
        with contextlib.suppress(AbliteratedError):  # a page is drawn from a whole report alone
            redraw(out)
    except (OSError, ValueError, TypeError) as error:
        log.warning("%s: the certification is not in it (%s)", path, error, extra={"action": "report"})


def _remember(folder: Path, show: Mapping[str, Any]) -> None:
    kept = {key: show[key] for key in _KEPT if key in show}
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o750)
        write_whole(folder / BASE_FILE, json.dumps(kept).encode(), mode=0o640)
    except OSError as error:
        log.warning("%s: can't be written (%s)", folder / BASE_FILE, error.strerror, extra={"action": "base"})


def _remembered(name: str, folder: Path) -> Any:
    """The base as it was, or None."""
    from abliterated.ollama.locate import base_from_show

    try:
        return base_from_show(name, json.loads((folder / BASE_FILE).read_bytes()))
    except (OSError, ValueError, AbliteratedError):
        return None


def _remembered_left(file: Path | None) -> set[str]:
    try:
        return set(msgspec.json.decode(file.read_bytes(), type=list[str])) if file else set()
    except (OSError, msgspec.MsgspecError):
        return set()
