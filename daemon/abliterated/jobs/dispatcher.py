"""The one task that owns the queue: asks the scheduler, starts workers, follows them, hands products on.

What a base is and how a product is registered is told to it by two callables; it does not know Ollama, sockets or the
spool.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from abliterate.contract.errors import AbliteratedError, ConflictError, DiskError
from abliterate.contract.messages import JobView, Progress, Result, Task
from abliterate.contract.states import TERMINAL, Reason, State
from abliterated.jobs.journal import Job, Journal
from abliterated.jobs.ledger import Ledger
from abliterated.jobs.outcome import Ended, Move, after_failure, after_worker, backoff, failure_of, is_passing
from abliterated.jobs.runner import Worker, end_orphan, follow, start_worker, stop_worker
from abliterated.jobs.scheduler import Conditions, decide

log = logging.getLogger(__name__)

Prepare = Callable[[Job, Path], Awaitable[Task]]
Register = Callable[[Job, Result, Path], Awaitable[list[str]]]
Publish = Callable[[JobView, int], None]
ENGINE_FIRST, ENGINE_LONGEST = 1.0, 60.0


@dataclass
class Running:
    """What is known of the job at work, in memory only."""

    job: Job
    worker: Worker | None = None
    progress: Progress | None = None
    cancelled: bool = False

    def asked_to_stop(self) -> bool:
        """Whether the job was cancelled meanwhile; asked anew after every await."""
        return self.cancelled


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
        idle_seconds: Callable[[], float] = lambda: float("inf"),
        retries: int = 5,
    ) -> None:
        self._ledger = ledger
        self._folder = jobs
        self._prepare = prepare
        self._register = register
        self._publish = publish
        self._idle_seconds = idle_seconds
        self._retries = retries
        self._wake = asyncio.Event()
        self._stopping = False
        self._running: Running | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._engine_tries: dict[str, int] = {}
        self._impatient: dict[str, asyncio.Event] = {}
        self.paused = False

    # --- from outside -------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Look at the queue now: a job came, a setting changed, the engine answered."""
        self._wake.set()

    async def engine_answers(self) -> None:
        """The engine is there (again): whoever waits for it goes on at once, in the order they came."""
        self._engine_tries.clear()
        for bell in self._impatient.values():
            bell.set()
        for job in await self._ledger.do(Journal.active):
            if job.state == "queued" and job.reason == "ollama-down":
                await self._ledger.do(Journal.note, job.id, retry_at=0.0)
        self.wake()

    def view(self, job: Job) -> JobView:
        """The job as the client sees it, with the live progress where it runs."""
        progress = self._running.progress if self._running and self._running.job.id == job.id else None
        return JobView(
            id=job.id,
            label=job.label,
            model=job.model,
            target=job.target,
            state=job.state,
            reason=job.reason,
            explanation=job.explanation,
            stage=progress.stage if progress else ("register" if job.state == "registering" else job.stage),
            done=progress.done if progress else 0,
            total=progress.total if progress else 0,
            unit=progress.unit if progress else "",
            message=progress.message if progress else "",
            remaining=progress.remaining if progress else None,
            memory=progress.memory if progress else 0,
            attempts=job.attempts,
            submitted=job.submitted,
            started=job.started,
            ended=job.ended,
            failure=job.failure,
            result=job.result,
        )

    async def pause(self, paused: bool) -> None:
        self.paused = paused
        await self._ledger.do(Journal.set_setting, "paused", "yes" if paused else "")
        self.wake()

    async def cancel(self, job_id: str, actor: str) -> Job:
        """Cancel a job that has not ended. Raises ConflictError."""
        job = await self._ledger.do(Journal.get, job_id)
        if job.state in ("queued", "held"):
            return await self._move(job_id, "cancelled", actor=actor)
        if job.state in TERMINAL or job.state == "cancelling":
            raise ConflictError(f"job {job_id} is {job.state} already", remedy="There is nothing to cancel")
        job = await self._move(job_id, "cancelling", explanation="is being stopped", actor=actor)
        running = self._running
        if running and running.job.id == job_id:
            running.cancelled = True
            if running.worker:
                self._spawn(f"stop {job_id}", stop_worker(running.worker, patience=25.0))
        else:
            if bell := self._impatient.get(job_id):
                bell.set()
            task = self._tasks.get(job_id)
            if task is None or task.done():
                job = await self._move(job_id, "cancelled", actor=actor)
        return job

    async def hold(self, job_id: str, actor: str) -> Job:
        job = await self._ledger.do(Journal.get, job_id)
        if job.state != "queued":
            raise ConflictError(f"job {job_id} is {job.state}", remedy="Only a queued job can be held")
        return await self._move(job_id, "held", reason="user", explanation="held by its user", actor=actor)

    async def release(self, job_id: str, actor: str) -> Job:
        job = await self._ledger.do(Journal.get, job_id)
        if job.state != "held":
            raise ConflictError(f"job {job_id} is {job.state}", remedy="Only a held job can be released")
        return await self._move(job_id, "queued", reason="ready", actor=actor, attempts=0, crashes=0)

    async def retry(self, job_id: str, actor: str) -> Job:
        job = await self._ledger.do(Journal.get, job_id)
        if job.state not in ("failed", "cancelled"):
            raise ConflictError(f"job {job_id} is {job.state}", remedy="Only a failed or cancelled job can be retried")
        return await self._move(job_id, "queued", reason="ready", actor=actor, attempts=0, crashes=0)

    async def stop(self) -> None:
        """Stop the worker; its job goes back to the queue. Registrations under way are left to the next start."""
        self._stopping = True
        self.wake()
        if self._running and self._running.worker:
            await stop_worker(self._running.worker)
        tasks = list(self._tasks.values())
        for task in tasks:
            if not task.get_name().startswith("job "):
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- the loop -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Recover what an earlier daemon left, then serve the queue until stopped."""
        await self._recover()
        while not self._stopping:
            self._wake.clear()
            look_again = await self._turn()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), look_again)

    async def _turn(self) -> float | None:
        jobs = await self._ledger.do(Journal.active)
        for job in jobs:
            if job.state == "registering" and job.id not in self._tasks:
                self._spawn(job.id, self._hand_over(job), name=f"register {job.id}")
        # Every ended job is read only where one of those that wait asks for it.
        asked = any(job.recipe.schedule.after for job in jobs)
        conditions = Conditions(
            now=time.time(),
            local=datetime.datetime.now().astimezone(),
            paused=self.paused,
            slot_taken=self._running is not None,
            idle_seconds=self._idle_seconds(),
            ended=await self._ledger.do(Journal.ended_by_label) if asked else {},
        )
        decision = decide(jobs, conditions)
        for waiting in decision.waiting:
            job = next(job for job in jobs if job.id == waiting.job)
            if (job.reason, job.explanation) != (waiting.reason, waiting.explanation):
                await self._ledger.do(Journal.note, job.id, reason=waiting.reason, explanation=waiting.explanation)
        if decision.start:
            job = next(job for job in jobs if job.id == decision.start)
            self._running = Running(job)
            self._spawn(job.id, self._work(job), name=f"job {job.id}")
        return decision.look_again

    async def _recover(self) -> None:
        self.paused = await self._ledger.do(Journal.setting, "paused") == "yes"
        for job in await self._ledger.do(Journal.active):
            if job.worker:
                end_orphan(job.worker)
            if job.state in ("starting", "running"):
                await self._move(
                    job.id, "queued", reason="interrupted", explanation="the daemon was restarted", worker=""
                )
            elif job.state == "cancelling":
                await self._move(job.id, "cancelled", worker="")

    async def _work(self, job: Job) -> None:
        running = self._running
        assert running is not None
        try:
            move: Move | None = await self._attempt(job, running)
        except Exception:
            log.exception("job %s: the dispatcher failed", job.id, extra={"action": "bug", "job": job.id})
            move = Move("held", "crash-loop", "the daemon failed on it; see its log", attempts=job.attempts + 1)
        result = running.worker.word if running.worker and isinstance(running.worker.word, Result) else None
        self._running = None
        try:
            if move is not None:
                await self._settle(job, move, result)
        finally:
            self._tasks.pop(job.id, None)
            self.wake()

    async def _settle(self, job: Job, move: Move, result: Result | None) -> None:
        changes: dict[str, Any] = {
            "worker": "",
            "attempts": move.attempts,
            "crashes": move.crashes,
            "failure": move.failure,
        }
        if result is not None:
            changes["result"] = result
        if move.retry_in:
            changes["retry_at"] = time.time() + move.retry_in
        current = await self._ledger.do(Journal.get, job.id)
        if current.state == move.state:
            # Still queued: nothing happened to it but the reason why it waits.
            await self._ledger.do(Journal.note, job.id, reason=move.reason, explanation=move.explanation, **changes)
            await self._tell(job.id)
            return
        new: State = "cancelled" if current.state == "cancelling" else move.state
        await self._move(job.id, new, reason=move.reason, explanation=move.explanation, **changes)

    async def _attempt(self, job: Job, running: Running) -> Move | None:
        """Prepare the job, run it, say what follows; None if somebody moved it while it was prepared."""
        folder = self._folder / job.id
        try:
            task = await self._prepare(job, folder)
            if (await self._ledger.do(Journal.get, job.id)).state != "queued" or self._stopping:
                return None
            running.job = await self._move(job.id, "starting", started=time.time())
            running.worker = await start_worker(task, folder)
        except AbliteratedError as error:
            if (await self._ledger.do(Journal.get, job.id)).state not in ("queued", "starting"):
                return None
            if is_passing(error):
                tries = self._engine_tries[job.id] = self._engine_tries.get(job.id, 0) + 1
                seconds = backoff(tries, ENGINE_FIRST, ENGINE_LONGEST)
                return Move("queued", "ollama-down", str(error), None, seconds, job.attempts, job.crashes)
            return after_failure(failure_of(error), attempts=job.attempts, crashes=job.crashes, retries=self._retries)
        self._engine_tries.pop(job.id, None)
        if running.asked_to_stop() or self._stopping:
            self._spawn(f"stop {job.id}", stop_worker(running.worker, patience=25.0))
        else:
            running.job = await self._move(job.id, "running", worker=running.worker.mark, failure=None)

        def tell(progress: Progress) -> None:
            running.progress = progress
            self._publish(self.view(running.job), 0)

        status = await follow(running.worker, tell)
        word = running.worker.word
        # What was made decides, not what was asked for: a folder becomes no GGUF where no converter is configured.
        made = word.format if isinstance(word, Result) else ""
        return after_worker(
            Ended(status, word, stopping=self._stopping, cancelled=running.cancelled),
            registers=job.recipe.export.register and made == "gguf",
            attempts=job.attempts,
            crashes=job.crashes,
            retries=self._retries,
        )

    async def _hand_over(self, job: Job) -> None:
        """Register the product, as long as it takes: the engine may be away for a day, the GPU is free meanwhile."""
        assert job.result is not None
        tries = 0
        while True:
            current = await self._ledger.do(Journal.get, job.id)
            if current.state == "cancelling":
                await self._move(job.id, "cancelled")
                break
            try:
                notes = await self._register(job, job.result, self._folder / job.id / "out")
            except AbliteratedError as error:
                if is_passing(error) or isinstance(error, DiskError):
                    tries += 1
                    reason: Reason = "disk" if isinstance(error, DiskError) else "ollama-down"
                    await self._ledger.do(Journal.note, job.id, reason=reason, explanation=str(error))
                    await self._tell(job.id)
                    await self._pause(job.id, backoff(tries, ENGINE_FIRST, ENGINE_LONGEST))
                    continue
                await self._end(job.id, "failed", explanation=error.message, failure=failure_of(error))
                break
            except Exception as error:
                log.exception("job %s: registration failed", job.id, extra={"action": "bug", "job": job.id})
                await self._end(job.id, "failed", explanation=f"registration failed: {error}")
                break
            kept = [*job.result.notes, *notes]
            await self._end(job.id, "succeeded", result=msgspec.structs.replace(job.result, notes=kept))
            shutil.rmtree(self._folder / job.id / "work", ignore_errors=True)
            (self._folder / job.id / "out" / job.result.product).unlink(missing_ok=True)
            break
        self._tasks.pop(job.id, None)
        self.wake()

    async def _pause(self, job_id: str, seconds: float) -> None:
        """Wait for `seconds`, or until the engine answers or somebody cancels the job."""
        bell = self._impatient.setdefault(job_id, asyncio.Event())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(bell.wait(), seconds)
        self._impatient.pop(job_id, None)

    async def _end(self, job_id: str, state: State, **changes: Any) -> None:
        current = await self._ledger.do(Journal.get, job_id)
        if current.state == "cancelling" and state == "failed":
            state = "cancelled"
        await self._move(job_id, state, **changes)

    # --- telling ------------------------------------------------------------------------------------------------

    async def _move(self, job_id: str, new: State, **changes: Any) -> Job:
        job, number = await self._ledger.do(Journal.move, job_id, new, **changes)
        log.info(
            "job %s %s%s", job_id, new, f" ({job.reason})" if job.reason else "", extra={"action": new, "job": job_id}
        )
        self._publish(self.view(job), number)
        self.wake()
        return job

    async def _tell(self, job_id: str) -> None:
        job = await self._ledger.do(Journal.find, job_id)
        if job is not None:
            self._publish(self.view(job), 0)

    def _spawn(self, key: str, work: Any, name: str = "") -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work, name=name or key)
        self._tasks[key] = task
        if not name:
            task.add_done_callback(lambda done: self._tasks.pop(key, None) if self._tasks.get(key) is done else None)
