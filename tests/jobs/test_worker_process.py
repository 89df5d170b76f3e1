"""The worker as a process: polite, on its own, gone with its daemon, and ended where it does not listen."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from abliterated.jobs import attempt, preflight
from abliterated.jobs.attempt import STOP_PATIENCE
from abliterated.jobs.journal import Journal
from abliterated.jobs.worker import CANCEL_SECONDS
from jobs.test_dispatcher import House, at_the_lock, house
from strangers import gone

__all__ = ["house"]

DAEMON = """
import asyncio, sys
from pathlib import Path
from abliterated.jobs.runner import start_worker
from abliterate.contract.messages import Task
from abliterate.contract.recipe import Recipe
root = Path(sys.argv[1])

async def main():
    task = Task(recipe=Recipe(model="ollama:m"), base="m", source="/nowhere", work=str(root), output=str(root),
                job="j", lock=str(root / "device.lock"))
    worker = await start_worker(task, root)
    while "waits" not in (await worker.events.readline()).decode():
        pass
    print(worker.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's own")


@linux
async def test_a_worker_is_polite_and_in_a_session_of_its_own(house: House) -> None:
    house.lock.acquire()
    house.start()
    job_id = await house.add()
    await house.until(job_id, at_the_lock)
    pid = await house.pid(job_id)
    worker = psutil.Process(pid)
    assert worker.nice() >= 10
    assert worker.ionice().ioclass == psutil.IOPRIO_CLASS_IDLE
    assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "800", "the first to go, not the proxy"
    assert os.getsid(pid) == os.getpgid(pid) == pid
    assert os.getsid(pid) != os.getsid(0)


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_goes_with_its_daemon_however_that_dies(tmp_path: Path, way: signal.Signals) -> None:
    lock = FileLock(tmp_path / "device.lock", preserve_lock_file=True)
    with lock:
        daemon = subprocess.Popen(
            [sys.executable, "-c", DAEMON, str(tmp_path)], stdout=subprocess.PIPE, start_new_session=True
        )
        assert daemon.stdout is not None
        pid = int(daemon.stdout.readline())
        os.kill(daemon.pid, way)
        daemon.wait(timeout=60)
        daemon.stdout.close()
        deadline = time.monotonic() + 60
        while not gone(pid):
            assert time.monotonic() < deadline, "it outlived its daemon"
            time.sleep(0.02)


async def test_a_worker_that_does_not_listen_is_ended_within_thirty_seconds(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CANCEL_SECONDS < STOP_PATIENCE < 30
    monkeypatch.setattr("abliterated.jobs.dispatcher.STOP_PATIENCE", 1.0)
    house.lock.acquire()
    house.start()
    job_id = await house.add()
    await house.until(job_id, at_the_lock)
    pid = await house.pid(job_id)
    os.kill(pid, signal.SIGSTOP)  # it hears nothing any more
    await house.dispatcher.cancel(job_id, "test")
    await house.until(job_id, lambda one: one.state == "cancelled")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_worker_that_does_not_listen_ends_itself_where_nobody_is_left_to_end_it() -> None:
    code = (
        "import threading\nfrom abliterated.jobs import worker\nworker.CANCEL_SECONDS = 0.1\n"
        "worker.Stop().ask()\nthreading.Event().wait()"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 86


async def test_without_memory_a_job_waits_and_says_so(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "free_memory", lambda: 100 * 10**6)
    house.start()
    job_id = await house.add()
    view = await house.until(job_id, lambda one: one.reason == "memory")
    assert (view.state, view.attempts) == ("queued", 0)
    assert "100 MB of memory are free" in view.explanation
    monkeypatch.undo()
    await house.ledger.do(Journal.note, job_id, retry_at=0.0)
    house.dispatcher.wake()
    await house.until(job_id, lambda one: one.state == "failed")


async def test_without_room_a_job_waits_and_goes_on_when_there_is_some(house: House) -> None:
    house.source.touch()
    os.truncate(house.source, 1 << 43)  # 9 TB of nothing
    begun = time.time()
    house.start()
    job_id = await house.add()
    view = await house.until(job_id, lambda one: one.reason == "disk")
    assert (view.state, view.attempts) == ("queued", 0)
    assert "the product need 9675.7 GB" in view.explanation
    assert (await house.ledger.do(Journal.get, job_id)).retry_at > begun + attempt.ROOM_SECONDS
    os.truncate(house.source, 100)
    await house.ledger.do(Journal.note, job_id, retry_at=0.0)
    house.dispatcher.wake()
    await house.until(job_id, lambda one: one.state == "failed")


async def test_a_journal_without_room_stops_neither_the_daemon_nor_the_job(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    monkeypatch.setattr("abliterated.jobs.dispatcher.FULL_SECONDS", 0.2)
    full = asyncio.Event()
    real = Journal._transaction

    def transaction(self: Journal, act: object) -> object:
        if full.is_set():
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        return real(self, act)  # type: ignore[arg-type]

    monkeypatch.setattr(Journal, "_transaction", transaction)
    house.lock.acquire()
    house.start()
    job_id = await house.add()
    await house.until(job_id, at_the_lock)
    full.set()
    house.lock.release()  # the worker ends now, and that can't be written
    pid = await house.pid(job_id)
    async with asyncio.timeout(60):
        while psutil.pid_exists(pid):
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
    assert house.task is not None
    assert not house.task.done()
    full.clear()
    view = await house.until(job_id, lambda one: one.state == "failed")
    assert view.failure is not None
