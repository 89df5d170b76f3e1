"""The desk: what the control API asks of the queue, and how a spooled or submitted recipe becomes a job.

Joins the rooms `jobs`, `spool` and `control` without their knowing each other; part of the wiring. Does not know HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from abliterate.contract.errors import DiskError, RecipeError
from abliterate.contract.ids import ULID, new_id
from abliterate.contract.matrix import expand, part_id
from abliterate.contract.messages import Cleaned, EngineView, JobView, Submit, Submitted
from abliterate.contract.recipe import Recipe, parse_recipe, recipe_digest, target_name
from abliterated.config import check_spooled
from abliterated.failpoints import failpoint
from abliterated.files import remove_leftovers, sync_folder, write_whole
from abliterated.jobs import retention
from abliterated.jobs.dispatcher import Dispatcher
from abliterated.jobs.journal import Job, Journal
from abliterated.jobs.ledger import Ledger
from abliterated.spool.tray import Accepted, printable


class QueueDesk:
    """Answers `control.server.Desk`, and takes what the tray accepted."""

    def __init__(
        self,
        ledger: Ledger,
        dispatcher: Dispatcher,
        jobs: Path,
        *,
        roots: list[str],
        engine: Callable[[], Awaitable[EngineView]],
        proxy_address: str,
        proxy_numbers: Callable[[], Mapping[str, float]],
        proxy_text: Callable[[], str] = str,
        tell: Callable[[Job], None],
        rejected: Path | None = None,
        keep_days: float = 90,
    ) -> None:
        self._ledger = ledger
        self._dispatcher = dispatcher
        self._jobs = jobs
        self._roots = roots
        self._engine = engine
        self._proxy_address = proxy_address
        self._proxy_numbers = proxy_numbers
        self._proxy_text = proxy_text
        self._tell = tell
        self._rejected = rejected or jobs.parent / "rejected"
        self._keep_days = keep_days
        self._loop = asyncio.get_running_loop()

    # --- recipes in ---------------------------------------------------------------------------------------------

    def check(self, recipe: Recipe) -> None:
        """What a spooled recipe must keep to. Raises RecipeError."""
        check_spooled(recipe, self._roots)

    def accept(self, accepted: Accepted) -> None:
        """Make a job of a spooled file; called in the tray's thread, safe to repeat for the same file."""
        if self._ledger.do_blocking(Journal.claimed, accepted.claim):
            return
        parts = _parts(accepted.id, accepted.recipe)
        known = self._ledger.do_blocking(Journal.find, accepted.id)
        if known is not None and known.digest != recipe_digest(parts[0][1]):
            raise RecipeError(
                f"{accepted.id}: a job of that id has another recipe",
                remedy="Drop it under a name without an id, or use `abliterate submit`",
            )
        if known is not None:
            return
        self._keep_copies(parts, accepted.data)
        failpoint("desk.copied")
        jobs = self._ledger.do_blocking(Journal.add_all, parts, accepted.label, claim=accepted.claim, actor="spool")
        self._loop.call_soon_threadsafe(self._arrived, jobs)

    def gone(self, claim: str) -> None:
        """The file of that claim was removed; called in the tray's thread."""
        self._ledger.do_blocking(Journal.file_gone, claim)

    async def sweep(self) -> None:
        """Remove what a death left: folders of jobs that never came to be, half-written files, handed-over products."""
        known = await self._ledger.do(Journal.ids)
        await asyncio.to_thread(_remove_unknown, self._jobs, known)
        active = await self._ledger.do(Journal.active)
        await asyncio.to_thread(_remove_half_written, [self._jobs / job.id for job in active], self._rejected)
        ended = await self._ledger.do(Journal.last_ended)
        await asyncio.to_thread(_remove_products, self._jobs, ended)

    async def submit(self, wanted: Submit, actor: str) -> Submitted:
        """Make a job of a recipe sent over the socket. Raises RecipeError, DiskError."""
        if wanted.id and not ULID.fullmatch(wanted.id):
            raise RecipeError(f"{wanted.id!r} is no job id", remedy="Leave it out, or send a lower-case ULID")
        data = wanted.recipe.encode()
        recipe = await asyncio.to_thread(parse_recipe, data, wanted.label or "recipe")
        self.check(recipe)
        job_id = wanted.id or new_id()
        known = await self._ledger.do(Journal.find, job_id)
        if known is not None:
            return Submitted(id=job_id, target=known.target, existing=True)
        parts = await asyncio.to_thread(_parts, job_id, recipe)
        await asyncio.to_thread(self._keep_copies, parts, data)
        label = printable(wanted.label) if wanted.label else target_name(recipe).short()
        jobs = await self._ledger.do(Journal.add_all, parts, label, actor=actor)
        self._arrived(jobs)
        return Submitted(id=job_id, target=jobs[0].target, jobs=[job.id for job in jobs])

    def _keep_copies(self, parts: list[tuple[str, Recipe]], data: bytes) -> None:
        for job_id, _ in parts:
            self._keep_copy(job_id, data)

    def _keep_copy(self, job_id: str, data: bytes) -> None:
        folder = self._jobs / job_id
        try:
            folder.mkdir(mode=0o750, exist_ok=True)
            failpoint("desk.folder-made")
            write_whole(folder / "recipe.toml", data, mode=0o440)
            sync_folder(self._jobs)
            failpoint("desk.folder-synced")
        except OSError as error:
            raise DiskError(f"{folder}: can't be written ({error.strerror})", remedy="Free some space there") from error

    def _arrived(self, jobs: list[Job]) -> None:
        for job in jobs:
            self._tell(job)
        self._dispatcher.wake()

    # --- questions ----------------------------------------------------------------------------------------------

    @property
    def paused(self) -> bool:
        return self._dispatcher.paused

    @property
    def draining(self) -> bool:
        return self._dispatcher.draining

    async def jobs(self) -> list[JobView]:
        return [self._dispatcher.view(job) for job in await self._ledger.do(Journal.jobs)]

    async def job(self, part: str) -> JobView:
        return self._dispatcher.view(await self._ledger.do(Journal.match, part))

    async def act(self, verb: str, job_id: str, actor: str) -> JobView:
        acts = {
            "cancel": self._dispatcher.cancel,
            "hold": self._dispatcher.hold,
            "release": self._dispatcher.release,
            "retry": self._dispatcher.retry,
        }
        return self._dispatcher.view(await acts[verb](job_id, actor))

    async def named(self) -> dict[str, Mapping[str, float]]:
        """Every name under which a job ended well, with what the latest of them measured."""
        ended = [job for job in await self._ledger.do(Journal.jobs) if job.state == "succeeded"]
        return {job.target: job.result.metrics if job.result else {} for job in ended}

    async def pause(self, paused: bool) -> None:
        await self._dispatcher.pause(paused)

    async def clean(self, days: float | None) -> Cleaned:
        """Forget what is older than `days`, or than the configuration keeps it."""
        kept = self._keep_days if days is None else days
        jobs, freed = await retention.clean(self._ledger, self._jobs, self._rejected, time.time(), kept)
        return Cleaned(jobs=jobs, bytes=freed)

    async def keep_clean(self) -> None:
        """Once a day, as long as the daemon runs."""
        while True:
            with contextlib.suppress(DiskError):  # a journal without room forgets another day
                await self.clean(None)
            await asyncio.sleep(86_400)

    async def drain(self) -> None:
        await self._dispatcher.drain()

    async def replay(self, after: int) -> list[tuple[int, JobView]]:
        """Every transition after `after`, each with its job as it is now."""
        rows, jobs = await self._ledger.do(_replayed, after)
        return [(number, self._dispatcher.view(jobs[job_id])) for number, job_id in rows if job_id in jobs]

    async def engine(self) -> EngineView:
        return await self._engine()

    def log_file(self, job_id: str) -> Path:
        return self._jobs / job_id / "log.txt"

    def report_file(self, job_id: str, name: str) -> Path:
        return self._jobs / job_id / "out" / name

    def proxy_address(self) -> str:
        return self._proxy_address

    def proxy_numbers(self) -> Mapping[str, float]:
        return self._proxy_numbers()

    def proxy_text(self) -> str:
        return self._proxy_text()


def certificates(journal: Journal) -> dict[str, Mapping[str, Any]]:
    """Of every name under which a job ended well: what the latest of them proved."""
    ended = [job for job in journal.jobs() if job.state == "succeeded"]
    return {job.target: job.result.certification for job in ended if job.result}


def _parts(job_id: str, recipe: Recipe) -> list[tuple[str, Recipe]]:
    """A recipe's jobs: itself, or one for each combination of its matrix."""
    return [(part_id(job_id, number), one) for number, one in enumerate(expand(recipe))]


def _replayed(journal: Journal, after: int) -> tuple[list[tuple[int, str]], dict[str, Job]]:
    """In one visit to the journal's thread, and each job read once."""
    rows = journal.transitions_after(after)
    found = {job_id: journal.find(job_id) for job_id in {job_id for _, job_id in rows}}
    return rows, {job_id: job for job_id, job in found.items() if job is not None}


def _remove_unknown(jobs: Path, known: set[str]) -> None:
    for folder in jobs.iterdir():
        if folder.name not in known and ULID.fullmatch(folder.name) and folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)


def _remove_half_written(folders: list[Path], rejected: Path) -> None:
    remove_leftovers(rejected)
    for folder in folders:
        for place in (folder, folder / "work", folder / "out"):
            remove_leftovers(place)


def _remove_products(jobs: Path, ended: list[Job]) -> None:
    """Of jobs whose model is in the engine, and of cancelled ones: a death may have come between end and removal."""
    for job in ended:
        folder = jobs / job.id
        registered = job.state == "succeeded" and job.recipe.export.register and job.result is not None
        if registered and job.result is not None and job.result.format == "gguf":
            (folder / "out" / job.result.product).unlink(missing_ok=True)
            shutil.rmtree(folder / "work", ignore_errors=True)
        elif job.state == "cancelled":
            shutil.rmtree(folder / "work", ignore_errors=True)
            shutil.rmtree(folder / "out", ignore_errors=True)


def stats_numbers(stats: msgspec.Struct) -> dict[str, float]:
    """The proxy's counters by name."""
    return {key: float(value) for key, value in msgspec.structs.asdict(stats).items()}
