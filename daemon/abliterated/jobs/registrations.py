"""Hands finished products over, as long as it takes: the engine may be away for a day, the device is free meanwhile.

Repeating a registration is harmless; a product is removed only when its model is proven and on the disk. Does not know
the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abliterate.contract.errors import AbliteratedError, DiskError
from abliterate.contract.messages import Result
from abliterate.contract.states import Reason, State
from abliterated.failpoints import failpoint
from abliterated.jobs.attempt import ENGINE_FIRST, ENGINE_LONGEST
from abliterated.jobs.journal import Job
from abliterated.jobs.moves import Moves
from abliterated.jobs.outcome import backoff, failure_of, is_passing

log = logging.getLogger(__name__)

Register = Callable[[Job, Result, Path], Awaitable[Result]]  # an error may carry a `result` to keep


@dataclass
class Registrations:
    """`hand_over` for each job in `registering`; `impatient` wakes those that wait for the engine."""

    moves: Moves
    folder: Path
    register: Register
    abandon: Callable[[Job], Awaitable[None]] | None = None  # whatever a registration had begun
    ending: set[asyncio.Future[None]] = field(default_factory=set)
    _bells: dict[str, asyncio.Event] = field(default_factory=dict)

    async def hand_over(self, job: Job) -> None:
        assert job.result is not None
        tries = 0
        while True:
            if (await self.moves.get(job.id)).state == "cancelling":
                if self.abandon is not None:
                    await self.abandon(job)
                await self.moves.move(job.id, "cancelled")
                return
            if not await asyncio.to_thread((self.folder / job.id / "out" / job.result.product).exists):
                gone = "its product is gone; it is made again"
                await self.moves.move(job.id, "queued", reason="interrupted", explanation=gone)
                return
            try:
                failpoint("register.begin")
                result = await self.register(job, job.result, self.folder / job.id / "out")
                failpoint("register.done")
            except (AbliteratedError, OSError) as caught:
                error = _told(caught, self.folder / job.id)
                if is_passing(error) or isinstance(error, DiskError):
                    tries += 1
                    reason: Reason = "disk" if error.failure == "disk" else "ollama-down"
                    current = await self.moves.get(job.id)
                    if (current.reason, current.explanation) != (reason, str(error)):
                        await self.moves.note(job.id, reason=reason, explanation=str(error))
                    await self._pause(job.id, backoff(tries, ENGINE_FIRST, ENGINE_LONGEST))
                    continue
                told = getattr(error, "result", None) or job.result
                failure = failure_of(error)
                await self._end(job.id, "failed", explanation=error.message, failure=failure, result=told)
                return
            except Exception as error:
                log.exception("job %s: registration failed", job.id, extra={"action": "bug", "job": job.id})
                await self._end(job.id, "failed", explanation=f"registration failed: {error}")
                return
            await asyncio.to_thread(_all_on_disk)
            failpoint("register.synced")
            # A daemon that stops now ends this first.
            ending = asyncio.ensure_future(self._finish(job, result))
            self.ending.add(ending)
            ending.add_done_callback(self.ending.discard)
            await asyncio.shield(ending)
            return

    async def _finish(self, job: Job, result: Result) -> None:
        assert job.result is not None
        await self._end(job.id, "succeeded", result=result)
        failpoint("register.ended")
        await asyncio.to_thread(self._remove, job.id, job.result.product)
        failpoint("register.removed")

    def impatient(self, job_id: str = "") -> None:
        """Try again at once: the engine answered, or somebody cancelled the job."""
        for known, bell in self._bells.items():
            if job_id in ("", known):
                bell.set()

    async def _pause(self, job_id: str, seconds: float) -> None:
        bell = self._bells.setdefault(job_id, asyncio.Event())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(bell.wait(), seconds)
        self._bells.pop(job_id, None)

    async def _end(self, job_id: str, state: State, **changes: Any) -> None:
        current = await self.moves.get(job_id)
        if current.state == "cancelling" and state == "failed":
            state = "cancelled"
        await self.moves.move(job_id, state, **changes)

    def _remove(self, job_id: str, product: str) -> None:
        shutil.rmtree(self.folder / job_id / "work", ignore_errors=True)
        (self.folder / job_id / "out" / product).unlink(missing_ok=True)


def _told(caught: AbliteratedError | OSError, folder: Path) -> AbliteratedError:
    """A disk without room as the error that waits for some. Raises what else the system says: that is a bug."""
    if isinstance(caught, AbliteratedError):
        return caught
    if caught.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise caught
    return DiskError(f"{folder}: {caught.strerror}", remedy="Free some space there")


def _all_on_disk() -> None:
    """An engine writes its blobs and manifests without fsync, into folders that may not be ours: sync everything."""
    os.sync()
