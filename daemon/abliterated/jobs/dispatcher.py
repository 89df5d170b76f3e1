"""The one task that owns the queue: asks the scheduler, starts attempts, hands products on, answers people's wishes.

What a base is and how a product is registered is told to it by callables; it does not know Ollama, sockets or the
spool.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from abliterate.contract.errors import ConflictError, DiskError
from abliterate.contract.messages import JobView, Result, Task
from abliterate.contract.states import TERMINAL, State
from abliterated.failpoints import failpoint
from abliterated.jobs.attempt import STOP_PATIENCE, Attempts, Prepare, Present, Running
from abliterated.jobs.awake import Awake
from abliterated.jobs.clock import Clock
from abliterated.jobs.executor import Executor
from abliterated.jobs.journal import Job, Journal
from abliterated.jobs.ledger import Ledger
from abliterated.jobs.moves import Moves, Publish
from abliterated.jobs.outcome import Move, jittered
from abliterated.jobs.registrations import Register, Registrations
from abliterated.jobs.runner import LocalExecutor
from abliterated.jobs.scheduler import Conditions, Device, decide, fetches

log = logging.getLogger(__name__)
T = TypeVar("T")

Release = Callable[[Job], Awaitable[None]]
DEVICES_SECONDS = 10.0
FULL_SECONDS = 5.0  # until a journal that had no room is tried again


async def product_is_there(job: Job, out: Path) -> bool:
    """Whether what the job made is still in its folder."""
    return job.result is not None and await asyncio.to_thread((out / job.result.product).exists)


class Dispatcher:
    """`run()` until `stop()`. All methods belong to the event loop's thread."""

    def __init__(
        self,
        ledger: Ledger,
        jobs: Path,
        *,
        prepare: Prepare,
        register: Register,
        publish: Publish,
        release: Release | None = None,
        abandon: Release | None = None,
        idle_seconds: Callable[[], float] = lambda: float("inf"),
        retries: int = 5,
        executor: Executor | None = None,
        devices: Callable[[], Sequence[Device]] = lambda: (Device("cpu"),),
        locks: Path | None = None,
        store: Callable[[Task], Path | None] = lambda task: None,
        present: Present = product_is_there,
        clock: Clock | None = None,
        awake: Awake | None = None,
    ) -> None:
        self._ledger = ledger
        self._folder = jobs
        self._release = release
        self._idle_seconds = idle_seconds
        self._devices = devices
        self._known_devices: tuple[float, Sequence[Device]] = (float("-inf"), ())
        self._clock = clock or Clock()
        self._executor = executor or LocalExecutor()
        self._awake = awake or Awake([])
        self._moves = Moves(ledger, publish)
        self._attempts = Attempts(
            ledger, self._moves, jobs, prepare, present, self._executor, self._clock, retries, locks, store
        )
        self._attempts.engine_answered = self.engine_answers
        self._registrations = Registrations(self._moves, jobs, register, abandon)
        self._stopping = False
        self._ends = asyncio.Event()
        self._running: dict[str, Running] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.paused = False
        self.draining = False

    # --- from outside -------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Look at the queue now: a job came, a setting changed, the engine answered."""
        self._moves.moved.set()

    async def engine_answers(self) -> None:
        """The engine is there (again): whoever waits for it goes on at once, in the order they came."""
        self._attempts.engine_tries = 0
        self._registrations.impatient()
        with contextlib.suppress(DiskError):  # then each waits for its own time
            for job in await self._ledger.do(Journal.active):
                if job.state == "queued" and job.reason == "ollama-down":
                    await self._ledger.do(Journal.note, job.id, retry_at=0.0)
        self.wake()

    def view(self, job: Job) -> JobView:
        """The job as the client sees it, with the live progress where it runs."""
        return self._moves.view(job)

    async def pause(self, paused: bool) -> None:
        """Start no further job, or start them again; the latter ends a drain too."""
        self.paused = paused
        self.draining = self.draining and paused
        await self._remember()

    async def drain(self) -> None:
        """Start no further job and stop those at work: they go on at the stage they lost when the queue is resumed."""
        self.paused = self.draining = True
        await self._remember()
        workers = [one.worker for one in self._running.values() if one.worker]
        await asyncio.gather(*(worker.stop(STOP_PATIENCE) for worker in workers))
        tasks = [task for task in self._tasks.values() if task.get_name().startswith("job ")]
        await asyncio.gather(*tasks, return_exceptions=True)

    async def cancel(self, job_id: str, actor: str) -> Job:
        """Cancel a job that has not ended. Raises ConflictError."""
        job = await self._moves.get(job_id)
        if job.state in ("queued", "held"):
            return await self._ended(await self._moves.move(job_id, "cancelled", actor=actor))
        if job.state in TERMINAL or job.state == "cancelling":
            raise ConflictError(f"job {job_id} is {job.state} already", remedy="There is nothing to cancel")
        job = await self._moves.move(job_id, "cancelling", explanation="is being stopped", actor=actor)
        if running := self._running.get(job_id):
            running.cancelled = True
            if running.worker:
                self._spawn(f"stop {job_id}", running.worker.stop(STOP_PATIENCE))
        else:
            self._registrations.impatient(job_id)
            task = self._tasks.get(job_id)
            if task is None or task.done():
                job = await self._ended(await self._moves.move(job_id, "cancelled", actor=actor))
        return job

    async def hold(self, job_id: str, actor: str) -> Job:
        job = await self._moves.get(job_id)
        if job.state != "queued":
            raise ConflictError(f"job {job_id} is {job.state}", remedy="Only a queued job can be held")
        return await self._moves.move(job_id, "held", reason="user", explanation="held by its user", actor=actor)

    async def release(self, job_id: str, actor: str) -> Job:
        return await self._again(job_id, ("held",), "Only a held job can be released", actor)

    async def retry(self, job_id: str, actor: str) -> Job:
        return await self._again(
            job_id, ("failed", "cancelled"), "Only a failed or cancelled job can be retried", actor
        )

    async def stop(self) -> None:
        """Stop the workers; their jobs go back to the queue. Registrations under way are left to the next start."""
        self._stopping = True
        self._ends.set()
        self.wake()
        workers = [one.worker for one in self._running.values() if one.worker]
        await asyncio.gather(*(worker.stop() for worker in workers))
        tasks = list(self._tasks.values())
        for task in tasks:
            if not task.get_name().startswith("job "):
                task.cancel()
        await asyncio.gather(*tasks, *self._registrations.ending, return_exceptions=True)
        await self._awake.keep(False)

    # --- the loop -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Recover what an earlier daemon left, then serve the queue until stopped."""
        await self._patiently(self._recover)
        while not self._stopping:
            self._moves.moved.clear()
            look_again = await self._patiently(self._turn)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._moves.moved.wait(), look_again)

    async def _patiently(self, act: Callable[[], Awaitable[T]]) -> T | None:
        """A full disk stops no daemon: what the journal can't take now it takes when there is room again."""
        while True:
            try:
                return await act()
            except DiskError as error:
                log.error("the queue waits: %s", error, extra={"action": "journal"})
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._ends.wait(), FULL_SECONDS)
                    return None  # the next daemon finds the job where the journal last had it

    async def _turn(self) -> float | None:
        jobs = await self._ledger.do(Journal.active)
        for job in jobs:
            if job.state == "registering" and job.id not in self._tasks:
                self._spawn(job.id, self._hand_over(job), name=f"register {job.id}")
        # Every ended job is read only where one of those that wait asks for it.
        asked = any(job.recipe.schedule.after for job in jobs)
        waits = any(job.state == "queued" for job in jobs)
        conditions = Conditions(
            now=self._clock.wall(),
            local=self._clock.local(),
            paused=self.paused,
            draining=self.draining,
            active=[one.active() for one in self._running.values()],
            devices=await self._look_at_devices() if waits else (),
            idle_seconds=self._idle_seconds(),
            engine=self._attempts.engine(),
            ended=await self._ledger.do(Journal.ended_by_label) if asked else {},
        )
        decision = decide(jobs, conditions)
        by_id = {job.id: job for job in jobs}
        for waiting in decision.waiting:
            job = by_id[waiting.job]
            if (job.reason, job.explanation) != (waiting.reason, waiting.explanation):
                await self._ledger.do(Journal.note, job.id, reason=waiting.reason, explanation=waiting.explanation)
        for start in decision.start:
            job = by_id[start.job]
            running = Running(job, start.device, fetching=fetches(job))
            self._running[job.id] = running
            self._spawn(job.id, self._work(running), name=f"job {job.id}")
        await self._awake.keep(bool(self._running))
        return decision.look_again

    async def _look_at_devices(self) -> Sequence[Device]:
        now = asyncio.get_running_loop().time()
        seen, devices = self._known_devices
        if now - seen >= DEVICES_SECONDS:
            devices = await asyncio.to_thread(self._devices)
            self._known_devices = (now, devices)
        return devices

    async def _recover(self) -> None:
        self.paused, self.draining = {"yes": (True, False), "drain": (True, True)}.get(
            await self._ledger.do(Journal.setting, "paused"), (False, False)
        )
        for job in await self._ledger.do(Journal.active):
            if job.worker:
                await asyncio.to_thread(self._executor.end_orphan, job.worker)
            if job.state in ("starting", "running"):
                await self._moves.move(
                    job.id, "queued", reason="interrupted", explanation="the daemon was restarted", worker=""
                )
            elif job.state == "cancelling":
                await self._ended(await self._moves.move(job.id, "cancelled", worker=""))

    async def _work(self, running: Running) -> None:
        job = running.job
        others = [one for one in self._running.values() if one is not running]
        try:
            move = await self._attempts.make(running, others, lambda: self._stopping or self.draining)
        except Exception:
            log.exception("job %s: the dispatcher failed", job.id, extra={"action": "bug", "job": job.id})
            move = Move("held", "crash-loop", "the daemon failed on it; see its log", attempts=job.attempts + 1)
        if self._release is not None:
            with contextlib.suppress(Exception):
                await self._release(job)
        word = running.worker.word if running.worker else None
        result = word if isinstance(word, Result) else move.result if move else None
        try:
            if move is not None:
                settled = move
                await self._patiently(lambda: self._settle(job, settled, result))
        finally:
            self._running.pop(job.id, None)
            self._moves.progress.pop(job.id, None)
            self._tasks.pop(job.id, None)
            self.wake()

    async def _settle(self, job: Job, move: Move, result: Result | None) -> None:
        changes: dict[str, Any] = {
            "worker": "",
            "attempts": move.attempts,
            "crashes": move.crashes,
            "failure": move.failure,
            "stage": move.stage,
        }
        if result is not None:
            changes["result"] = result
        if move.retry_in:
            changes["retry_at"] = self._clock.wall() + jittered(move.retry_in, job.id, move.attempts)
        failpoint("dispatcher.settles")
        current = await self._moves.get(job.id)
        self._moves.progress.pop(job.id, None)
        if current.state == move.state:
            # Still queued: nothing happened to it but the reason why it waits.
            if move.reason == "ollama-down" and not move.retry_in and current.explanation == move.explanation:
                return
            await self._moves.note(job.id, reason=move.reason, explanation=move.explanation, **changes)
            return
        new: State = "cancelled" if current.state == "cancelling" else move.state
        await self._ended(
            await self._moves.move(job.id, new, reason=move.reason, explanation=move.explanation, **changes)
        )

    async def _hand_over(self, job: Job) -> None:
        try:
            await self._patiently(lambda: self._registrations.hand_over(job))
            await self._ended(await self._moves.get(job.id))
        finally:
            self._tasks.pop(job.id, None)
            self.wake()

    # --- inside -------------------------------------------------------------------------------------------------

    async def _ended(self, job: Job) -> Job:
        """What a cancelled job made so far is of no use to anybody; its recipe and its log stay."""
        if job.state == "cancelled":
            await asyncio.to_thread(_remove_folders, self._folder / job.id / "work", self._folder / job.id / "out")
        return job

    async def _again(self, job_id: str, allowed: tuple[State, ...], remedy: str, actor: str) -> Job:
        job = await self._moves.get(job_id)
        if job.state not in allowed:
            raise ConflictError(f"job {job_id} is {job.state}", remedy=remedy)
        return await self._moves.move(job_id, "queued", reason="ready", actor=actor, attempts=0, crashes=0, stage="")

    async def _remember(self) -> None:
        told = "drain" if self.draining else "yes" if self.paused else ""
        await self._ledger.do(Journal.set_setting, "paused", told)
        self.wake()

    def _spawn(self, key: str, work: Coroutine[Any, Any, None], name: str = "") -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work, name=name or key)
        self._tasks[key] = task
        if not name:
            task.add_done_callback(lambda done: self._tasks.pop(key, None) if self._tasks.get(key) is done else None)


def _remove_folders(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
