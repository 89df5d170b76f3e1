"""One attempt at one job: prepare it, see whether it was done before and has room, run a worker, say what follows.

Moves the job to `starting` and `running`; what comes after is the dispatcher's. Does not know the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from abliterate.contract.errors import AbliteratedError, ConflictError, DiskError, EngineRefused
from abliterate.contract.messages import Progress, Result, Task
from abliterate.contract.states import IllegalTransition, Reason
from abliterated.failpoints import failpoint
from abliterated.files import sync_folder
from abliterated.jobs import preflight
from abliterated.jobs.clock import Clock
from abliterated.jobs.cluster import ClusterAway
from abliterated.jobs.executor import Executor, Handle
from abliterated.jobs.hang import Pulse, felt, hung
from abliterated.jobs.journal import Job, Journal
from abliterated.jobs.ledger import Ledger
from abliterated.jobs.moves import Moves
from abliterated.jobs.outcome import Ended, Move, after_failure, after_worker, backoff, failure_of, is_passing
from abliterated.jobs.preflight import Need
from abliterated.jobs.scheduler import Active, Device, EngineAway, fetches, needs_engine

Prepare = Callable[[Job, Path], Awaitable[Task]]
Present = Callable[[Job, Path], Awaitable[bool]]

ENGINE_FIRST, ENGINE_LONGEST = 1.0, 10.0
ROOM_SECONDS = 60.0
CLUSTER_SECONDS = 30.0
PULSE_SECONDS = 30.0
STOP_PATIENCE = 25.0


@dataclass
class Running:
    """What is known of a job at work, in memory only."""

    job: Job
    device: Device
    worker: Handle | None = None
    fetching: bool = False
    waits: bool = False
    cancelled: bool = False
    hung: str = ""
    needs: Sequence[Need] = ()
    pulse: Pulse = field(default_factory=lambda: Pulse(0.0, 0.0))

    def active(self) -> Active:
        """The job as the scheduler sees it."""
        return Active(self.job.id, self.device.name, self.fetching, self.waits)

    def asked_to_stop(self) -> bool:
        """Whether the job was cancelled meanwhile; asked anew after every await."""
        return self.cancelled


@dataclass
class Attempts:
    """What every attempt needs to know of the house. `locks`: where device locks lie; None leaves the task's own."""

    ledger: Ledger
    moves: Moves
    folder: Path
    prepare: Prepare
    present: Present
    executor: Executor
    clock: Clock
    retries: int
    locks: Path | None = None
    store: Callable[[Task], Path | None] = lambda task: None
    engine_answered: Callable[[], Awaitable[None]] | None = None
    engine_tries: int = 0
    engine_told: str = ""
    engine_asked: float = 0.0

    def engine(self) -> EngineAway | None:
        """What is known of an engine that did not answer; None of one that did."""
        if not self.engine_tries:
            return None
        due = self.engine_asked + backoff(self.engine_tries, ENGINE_FIRST, ENGINE_LONGEST)
        return EngineAway(self.engine_told, max(0.0, due - _now()))

    async def make(self, running: Running, others: Sequence[Running], stopping: Callable[[], bool]) -> Move | None:
        """The whole attempt; the next move, or None if somebody moved the job while it was prepared."""
        job = running.job
        folder = self.folder / job.id
        try:
            task = await self.prepare(job, folder)
            if self.engine_tries and needs_engine(job):
                self.engine_tries = 0
                if self.engine_answered is not None:
                    await self.engine_answered()
            # The folders just made must outlast a power cut as the files in them will.
            await asyncio.to_thread(sync_folder, folder)
            if self.locks is not None:
                task = msgspec.structs.replace(task, lock=str(self.locks / f"{running.device.name}.lock"))
            early = await self._early(running, task, others)
            if (await self.moves.get(job.id)).state != "queued" or stopping():
                return None
            if early is not None:
                return early
            running.job = await self.moves.move(job.id, "starting", started=self.clock.wall())
            failpoint("worker.before-start")
            running.fetching = not task.source and fetches(job)
            running.worker = await self.executor.start(task, folder, running.device)
            failpoint("worker.started")
            if not running.asked_to_stop() and not stopping():
                with contextlib.suppress(IllegalTransition):  # cancelled in this very moment
                    running.job = await self.moves.move(job.id, "running", worker=running.worker.mark, failure=None)
        except AbliteratedError as error:
            if running.worker is not None:
                # It works, and the journal had no room to say so: without a row nobody would find it again.
                await self._ended_unheard(running.worker)
            return await self._not_started(job, error)
        except OSError as error:
            full = DiskError(
                f"{folder}: no job can work there ({error.strerror or error})", remedy="Check that disk, and free space"
            )
            return await self._not_started(job, full)
        if running.asked_to_stop() or stopping():
            stop = asyncio.create_task(running.worker.stop(STOP_PATIENCE))
        else:
            stop = None
        status = await self._follow(running)
        if stop is not None:
            await stop
        return self._next(running, status, stopping())

    async def _ended_unheard(self, worker: Handle) -> None:
        stop = asyncio.create_task(worker.stop())
        await worker.follow(lambda progress: None)
        await stop

    async def _early(self, running: Running, task: Task, others: Sequence[Running]) -> Move | None:
        """What may be said before a worker is started: done before, or no room."""
        job = running.job
        base = await asyncio.to_thread(preflight.identity, task)
        if base:
            await self.ledger.do(Journal.note, job.id, base=base)
        if base and not job.recipe.force:
            before = await self.ledger.do(Journal.done_before, job, base)
            if before is not None and await self.present(before, self.folder / before.id / "out"):
                told = f"job {before.id} made this already; `force = true` makes it again"
                return Move("succeeded", "duplicate", told, attempts=job.attempts, result=before.result)
        short, reason = await asyncio.to_thread(self._room, running, task, others)
        if short:
            return Move("queued", reason, short, None, ROOM_SECONDS, job.attempts, job.crashes, job.stage)
        return None

    def _room(self, running: Running, task: Task, others: Sequence[Running]) -> tuple[str, Reason]:
        store = self.store(task)
        running.needs = preflight.needs(task, store)
        places = [Path(task.output), *([store] if store is not None and store.is_dir() else [])]
        promised = [need for one in others for need in one.needs]
        if short := preflight.lacking(running.needs, promised, preflight.rooms(places)):
            return short, "disk"
        if self.executor.here and (free := preflight.free_memory()) < preflight.LEAST_MEMORY:
            return (
                f"{free / 1e6:.0f} MB of memory are free, a worker needs {preflight.LEAST_MEMORY / 1e6:.0f}",
                "memory",
            )
        return "", ""

    async def _not_started(self, job: Job, error: AbliteratedError) -> Move | None:
        if (await self.moves.get(job.id)).state not in ("queued", "starting"):
            return None
        if isinstance(error, ClusterAway):
            return Move(
                "queued", "cluster-down", str(error), None, CLUSTER_SECONDS, job.attempts, job.crashes, job.stage
            )
        if is_passing(error):
            self.engine_tries += 1
            self.engine_told, self.engine_asked = str(error), _now()
            seconds = 0.0 if needs_engine(job) else backoff(self.engine_tries, ENGINE_FIRST, ENGINE_LONGEST)
            return Move("queued", "ollama-down", str(error), None, seconds, job.attempts, job.crashes, job.stage)
        failure = failure_of(error)
        if isinstance(error, EngineRefused | ConflictError):  # it answered, and asking again changes nothing
            return Move("failed", "", failure.message, failure, attempts=job.attempts + 1, crashes=job.crashes)
        return after_failure(failure, attempts=job.attempts, crashes=job.crashes, retries=self.retries)

    async def _follow(self, running: Running) -> int:
        worker = running.worker
        assert worker is not None
        running.pulse = Pulse(_now(), _now())

        def tell(progress: Progress) -> None:
            running.pulse = Pulse(_now(), running.pulse.worked, running.pulse.work)
            before = running.active()
            running.waits = progress.message.startswith("waits for the device")
            running.fetching = running.fetching and progress.stage == "fetch"
            if running.active() != before:
                self.moves.moved.set()
            self.moves.tell(running.job, progress)

        watch = asyncio.create_task(self._watch(running, worker))
        try:
            return await worker.follow(tell)
        finally:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch

    async def _watch(self, running: Running, worker: Handle) -> None:
        """End a worker that hangs."""
        while not running.hung:
            await asyncio.sleep(PULSE_SECONDS)
            work = await asyncio.to_thread(worker.work_done)
            running.pulse = felt(running.pulse, work, _now())
            running.hung = hung(running.pulse, _now(), waits=running.waits)
        await worker.stop()

    def _next(self, running: Running, status: int, stopping: bool) -> Move:
        worker, job = running.worker, running.job
        assert worker is not None
        word = worker.word
        # What was made decides, not what was asked for: a folder becomes no GGUF where no converter is configured.
        made = word.format if isinstance(word, Result) else ""
        progress = self.moves.progress.get(job.id)
        return after_worker(
            Ended(
                status,
                word,
                stopping=stopping,
                cancelled=running.cancelled,
                hung=running.hung,
                stage=progress.stage if progress else "",
            ),
            registers=job.recipe.export.register and made == "gguf",
            attempts=job.attempts,
            crashes=job.crashes,
            retries=self.retries,
            crashed_at=job.stage,
        )


def _now() -> float:
    return asyncio.get_running_loop().time()
