"""Moves jobs and tells whoever listens: the journal's row, the live progress beside it, the event.

The only way the queue changes a job. Does not know why one moves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from abliterate.contract.messages import JobView, Progress
from abliterate.contract.states import State
from abliterated.jobs.journal import Job, Journal
from abliterated.jobs.ledger import Ledger

log = logging.getLogger(__name__)

Publish = Callable[[JobView, int], None]


class Moves:
    """`moved` is set after every change; `progress` holds the newest of each job at work, in memory only."""

    def __init__(self, ledger: Ledger, publish: Publish) -> None:
        self._ledger = ledger
        self._publish = publish
        self.moved = asyncio.Event()
        self.progress: dict[str, Progress] = {}

    async def get(self, job_id: str) -> Job:
        return await self._ledger.do(Journal.get, job_id)

    async def move(self, job_id: str, new: State, **changes: Any) -> Job:
        """One legal transition, told. Raises what Journal.move raises."""
        job, number = await self._ledger.do(Journal.move, job_id, new, **changes)
        log.info(
            "job %s %s%s", job_id, new, f" ({job.reason})" if job.reason else "", extra={"action": new, "job": job_id}
        )
        self._publish(self.view(job), number)
        self.moved.set()
        return job

    async def note(self, job_id: str, **changes: Any) -> None:
        """Change what is known of a job without a transition, and tell it."""
        await self._ledger.do(Journal.note, job_id, **changes)
        job = await self._ledger.do(Journal.find, job_id)
        if job is not None:
            self._publish(self.view(job), 0)

    def tell(self, job: Job, progress: Progress) -> None:
        """The job came further."""
        self.progress[job.id] = progress
        self._publish(self.view(job), 0)

    def view(self, job: Job) -> JobView:
        """The job as the client sees it, with the live progress where it runs."""
        progress = self.progress.get(job.id)
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
