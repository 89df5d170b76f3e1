"""What is kept of ended jobs, and for how long. `expired` is pure; `clean` removes, journal first.

Recipes and logs stay `keep_days`; stages of a failed job a week, so that a retry goes on where it was; products that
were handed over go at once. Does not know who asks.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from abliterated.jobs.journal import Job, Journal
from abliterated.jobs.ledger import Ledger
from abliterated.jobs.preflight import size_of

DAY = 86_400.0
STAGE_DAYS = 7.0


def expired(jobs: Iterable[Job], now: float, keep_days: float) -> tuple[list[str], list[str]]:
    """Ids of the jobs to forget, and of those that lose their stages."""
    ended = [(job.id, now - job.ended) for job in jobs if job.ended is not None]
    forget = [job_id for job_id, age in ended if age >= keep_days * DAY]
    return forget, [job_id for job_id, age in ended if age >= STAGE_DAYS * DAY and job_id not in forget]


async def clean(ledger: Ledger, jobs: Path, rejected: Path, now: float, keep_days: float) -> tuple[int, int]:
    """Remove what is too old; how many jobs are forgotten, and how many bytes that freed."""
    from asyncio import to_thread

    found = await ledger.do(Journal.ended_before, now - min(keep_days, STAGE_DAYS) * DAY)
    ended = [job for job_id in found if (job := await ledger.do(Journal.find, job_id)) is not None]
    forget, strip = expired(ended, now, keep_days)
    if forget:
        # The journal first: a folder without a row is removed at the next start, a row without a folder never.
        await ledger.do(Journal.remove, forget)
    freed = await to_thread(_remove, [jobs / job_id for job_id in forget])
    freed += await to_thread(_remove, [jobs / job_id / "work" for job_id in strip])
    freed += await to_thread(_remove_old, rejected, now - keep_days * DAY)
    await ledger.do(Journal.refill)
    return len(forget), freed


def _remove(folders: list[Path]) -> int:
    freed = 0
    for folder in folders:
        if folder.is_dir():
            freed += size_of(folder)
            shutil.rmtree(folder, ignore_errors=True)
    return freed


def _remove_old(folder: Path, before: float) -> int:
    freed = 0
    for path in folder.iterdir() if folder.is_dir() else ():
        status = path.lstat()
        if status.st_mtime < before and not path.is_dir():
            freed += status.st_size
            path.unlink(missing_ok=True)
    return freed
