"""What the control API asks about models: diagnosis, repair, removal, the list; and whether this installation is well.

Part of the wiring: joins the room `ollama` with the journal, which alone knows the names we gave. Does not know HTTP.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import msgspec

from abliterate.contract.care import (
    Diagnosis,
    DoctorRequest,
    Finding,
    ModelRow,
    Models,
    Repaired,
    RepairRequest,
    Undone,
    UndoRequest,
)
from abliterate.contract.config import Config
from abliterate.contract.errors import AbliteratedError, ConflictError, ModelError, NotFound
from abliterate.contract.names import parse_name
from abliterate.contract.paths import Home
from abliterated import __version__

_LITTLE, _TOO_LITTLE = 20e9, 2e9  # bytes free: less than a middling model needs; less than any does


class Care:
    """For one engine. `named`: every name the journal says we gave, with what was measured; None without a journal."""

    def __init__(
        self,
        upstream: str,
        config: Config,
        home: Home | None = None,
        *,
        named: Callable[[], Awaitable[Mapping[str, Mapping[str, float]]]] | None = None,
        proxy: str | None = None,
    ) -> None:
        self._upstream = upstream
        self._config = config
        self._home = home
        self._named = named
        self._proxy = proxy

    async def doctor(self, wanted: DoctorRequest) -> Diagnosis:
        """A model's diagnosis; without a model the installation's. Raises NotFound, ModelError, EngineUnavailable."""
        if not wanted.model:
            return await self.installation()
        from abliterated.ollama.client import OllamaClient
        from abliterated.ollama.doctor import diagnose

        async with OllamaClient(self._upstream) as client:
            return await diagnose(client, wanted.model, wanted.base, deep=wanted.deep)

    async def repair(self, wanted: RepairRequest) -> Repaired:
        """A model put right, or back as it was."""
        from abliterated.ollama.client import OllamaClient
        from abliterated.ollama.repair import go_back, repair

        async with OllamaClient(self._upstream) as client:
            return await (go_back(client, wanted.model) if wanted.back else repair(client, wanted.model, wanted.base))

    async def undo(self, wanted: UndoRequest) -> Undone:
        """A model of ours removed. Raises ConflictError where the name is not one we gave, unless `copy` is said."""
        from abliterated.ollama.client import OllamaClient
        from abliterated.ollama.removal import undo

        name = parse_name(wanted.model)
        if self._named is not None and not wanted.copy:
            ours = {parse_name(given).key() for given in await self._named()}
            if name.key() not in ours:
                await self._explain_copy(name.short())
        async with OllamaClient(self._upstream) as client:
            return await undo(client, name.short())

    async def models(self) -> Models:
        """Every model of our making; what its GGUF does not tell of refusals, the journal may."""
        from abliterated.ollama.client import OllamaClient
        from abliterated.ollama.removal import list_ours

        async with OllamaClient(self._upstream) as client:
            found = await list_ours(client)
        measured = await self._named() if self._named is not None else {}
        rows = [_with_measured(row, measured.get(row.name, {})) for row in found.models]
        return msgspec.structs.replace(found, models=rows)

    async def _explain_copy(self, name: str) -> None:
        """A name this daemon never gave: somebody's copy of ours, or another daemon's. Raises ConflictError for it."""
        from abliterated.ollama.client import OllamaClient
        from abliterated.ollama.register import find_show, shown_content

        async with OllamaClient(self._upstream) as client:
            shown = await find_show(client, name)
        content = await asyncio.to_thread(shown_content, shown) if shown is not None else ""
        if content:
            raise ConflictError(
                f"{name}: its weights are of our making, its name is not one this daemon gave: a copy somebody made "
                "(`ollama cp`), another daemon's, or of a job cleaned away since",
                remedy=f"`abliterate undo {name} --copy` removes it all the same",
            )

    # --- the installation ---------------------------------------------------------------------------------------

    async def installation(self) -> Diagnosis:
        """Engine, store, disk, proxy and configuration. Never raises ours: what fails is a finding."""
        version, engine = await self._engine()
        found = [*self._daemon(), *engine]
        found += await asyncio.to_thread(self._disk)
        converter = self._config.tools.converter
        if converter and shutil.which(converter) is None:
            found.append(
                Finding(
                    key="config",
                    level="problem",
                    text=f"tools.converter: {converter} is no program",
                    remedy="Correct it in config.toml",
                )
            )
        return Diagnosis(engine=version, findings=found)

    def _daemon(self) -> list[Finding]:
        if self._proxy is None:
            return [Finding(key="daemon", level="note", text=f"abliterated {__version__}, asked without its daemon")]
        text = f"proxy on {self._proxy}, for {self._upstream}" if self._proxy else "the proxy is turned off"
        return [
            Finding(key="daemon", level="ok", text=f"abliterated {__version__} serves"),
            Finding(key="proxy", level="ok" if self._proxy else "note", text=text),
        ]

    async def _engine(self) -> tuple[str, list[Finding]]:
        from abliterated.ollama.client import OllamaClient

        try:
            async with OllamaClient(self._upstream) as client:
                version = await client.version()
                found = [Finding(key="engine", level="ok", text=f"{self._upstream}: version {version.text}")]
                if version.too_old:
                    text = f"Ollama {version.text} is too old to register with"
                    remedy = "Update it to 0.5 or newer"
                    found = [Finding(key="engine", level="problem", text=text, remedy=remedy)]
                found += [Finding(key="engine", level="warning", text=note) for note in version.notes()]
                found += [await _store(client), *_passing([str(row.get("name")) for row in await client.tags()])]
                return version.text, found
        except AbliteratedError as error:
            return "", [Finding(key="engine", level="problem", text=error.message, remedy=error.remedy)]

    def _disk(self) -> list[Finding]:
        if self._home is None:
            return []
        found: list[Finding] = []
        for name, folder in (("state", self._home.state), ("spool", self._home.spool)):
            place = next(one for one in (folder, *folder.parents) if one.exists())
            try:
                free = shutil.disk_usage(place).free
            except OSError as error:
                text = f"{place}: can't be looked at ({error.strerror})"
                found.append(Finding(key="disk", level="problem", text=text, remedy=f"Check paths.{name}"))
                continue
            if name == "state":
                level = "problem" if free < _TOO_LITTLE else "warning" if free < _LITTLE else "ok"
                remedy = "" if level == "ok" else "A model needs about its own size there while it is made"
                text = f"{place}: {free / 1e9:.1f} GB free"
                found.append(Finding(key="disk", level=level, text=text, remedy=remedy))  # type: ignore[arg-type]
        found += _rejected(self._home.rejected)
        return found


def _with_measured(row: ModelRow, metrics: Mapping[str, float]) -> ModelRow:
    before = metrics.get("refusal_before") if row.refusal_before is None else row.refusal_before
    after = metrics.get("refusal_after") if row.refusal_after is None else row.refusal_after
    return msgspec.structs.replace(row, refusal_before=before, refusal_after=after)


async def _store(client: object) -> Finding:
    """Whether the engine's files are here, readable, and linkable."""
    from abliterated.ollama import store
    from abliterated.ollama.client import OllamaClient
    from abliterated.ollama.locate import resolve_base

    assert isinstance(client, OllamaClient)
    if not client.local:
        return Finding(key="store", level="note", text="the engine is on another host: everything goes over HTTP")
    rows = await client.tags()
    for row in rows[:8]:
        try:
            base = await resolve_base(client, str(row.get("name")))
        except NotFound:
            continue
        except ModelError as error:
            if "cloud" in error.message or "safetensors" in error.message:
                continue
            return Finding(key="store", level="problem", text=error.message, remedy=error.remedy)
        folder = await asyncio.to_thread(store.blobs_folder, base.blob_path)
        how = "writable: products are linked into it" if folder else "readable: products are copied over HTTP"
        return Finding(key="store", level="ok", text=f"{base.blob_path.parent}: {how}")
    return Finding(key="store", level="note", text="the engine has no local model yet, so its store was not looked at")


def _passing(names: list[str]) -> list[Finding]:
    """Models at names that only a registration under way has."""
    from abliterated.ollama.admission import PROVISIONAL, REPLACED

    left = [name for name in names if name.endswith((PROVISIONAL, REPLACED))]
    if not left:
        return []
    text = f"{', '.join(left)}: of a job that hands over now, or of one cancelled while the engine was away"
    return [Finding(key="passing", level="note", text=text, remedy="`abliterate undo NAME --copy`, if no job does")]


def _rejected(folder: Path) -> list[Finding]:
    try:
        count = sum(1 for path in folder.glob("*.reason.txt"))
    except OSError:
        return []
    if not count:
        return []
    text = f"{folder}: {count} recipes were rejected; each has its reason beside it"
    return [Finding(key="spool", level="note", text=text)]
