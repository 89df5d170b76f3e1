"""The device lock: one holder, freed by its death, and its file never removed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from abliterate.contract.errors import Cancelled
from abliterated.jobs.gpu import device_lock, holder, lock_file

HOLD = """
import sys
from pathlib import Path
from abliterated.jobs.gpu import device_lock
with device_lock(Path(sys.argv[1]), waiting=lambda who: None, cancelled=lambda: False, job="theirs"):
    print("held", flush=True)
    sys.stdin.read()
"""


def start_holder(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str], number: int) -> None:
    process.send_signal(number)
    process.communicate(timeout=60)


def test_a_second_process_waits_and_is_told_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "gpu.lock"
    process = start_holder(path)
    told: list[str] = []
    with (
        pytest.raises(Cancelled),
        device_lock(path, waiting=told.append, cancelled=lambda: bool(told), job="ours"),
    ):
        pytest.fail("two holders")
    assert told == [f"pid {process.pid} job theirs"]
    end(process, signal.SIGTERM)


def test_a_killed_holder_frees_the_lock_at_once(tmp_path: Path) -> None:
    path = tmp_path / "gpu.lock"
    end(start_holder(path), signal.SIGKILL)
    told: list[str] = []
    with device_lock(path, waiting=told.append, cancelled=lambda: False, job="ours"):
        assert "ours" in holder(path)
    assert told == []
    assert path.exists(), "a lock file that is removed can be held twice"


def test_the_processor_has_a_lock_of_its_own(tmp_path: Path) -> None:
    assert lock_file(tmp_path, "cpu") == tmp_path / "cpu.lock"
    assert lock_file(tmp_path, "mps") == tmp_path / "mps.lock"
