"""The machine does not sleep while a job runs, and may again when none does."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from abliterated.jobs.awake import Awake, command
from jobs.test_dispatcher import House, at_the_lock

HOLD = ["sh", "-c", "echo begun >> told; cat; echo ended >> told"]


async def told(folder: Path, text: str) -> None:
    async with asyncio.timeout(60):
        while not (folder / "told").exists() or (folder / "told").read_text() != text:
            await asyncio.sleep(0.01)


async def test_one_helper_is_held_while_wanted_however_often_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    awake = Awake(HOLD)
    for _ in range(3):
        await awake.keep(True)
    await told(tmp_path, "begun\n")
    for _ in range(3):
        await awake.keep(False)
    await told(tmp_path, "begun\nended\n")


async def test_a_helper_that_is_not_there_or_refuses_stops_no_job() -> None:
    for argv in ([], ["/nowhere/at/all"], ["false"]):
        awake = Awake(argv)
        await awake.keep(True)
        await awake.keep(False)


async def test_it_is_held_by_a_running_job_and_let_go_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    house = House(tmp_path)
    house.dispatcher._awake = Awake(HOLD)
    house.lock.acquire()
    house.start()
    job_id = await house.add()
    await house.until(job_id, at_the_lock)
    await told(tmp_path, "begun\n")
    house.lock.release()
    await house.until(job_id, lambda one: one.state == "failed")
    await told(tmp_path, "begun\nended\n")
    await house.stop()
    house.ledger.close()


def test_the_helper_goes_with_a_killed_daemon(tmp_path: Path) -> None:
    code = f"""
import asyncio, os, signal
from abliterated.jobs.awake import Awake
async def main():
    await Awake({HOLD!r}).keep(True)
    while not os.path.exists("told"):
        await asyncio.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=30).returncode == -9
    asyncio.run(told(tmp_path, "begun\nended\n"))


def test_each_system_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    assert command("darwin")[0] == "caffeinate"
    assert "--what=sleep:idle" in command("linux")
    assert command("win32") == []
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert command("linux") == command("darwin") == []
