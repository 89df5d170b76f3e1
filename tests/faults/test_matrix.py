"""A death at every place a daemon can die, with and without what the disk had not yet: nothing lost, doubled or wrong.

`make nightly` does all ordered pairs and a thousand random ones as well.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from faults.matrix import SABOTAGES, traced

TESTS = Path(__file__).resolve().parents[1]
DAEMON = TESTS.parent / "daemon" / "abliterated"
# What the real worker alone reaches; tests/jobs/test_worker_process.py and tests/pipeline/test_run_killed.py kill that.
ELSEWHERE = {"worker.task-written"}


def matrix(*arguments: str) -> dict[str, Any]:
    told = subprocess.run(
        [sys.executable, "-m", "faults.matrix", *arguments],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    figures: dict[str, Any] = json.loads(told.stdout[told.stdout.index("{") :])
    return figures


@pytest.mark.parametrize(
    "arguments",
    [
        ["--kills", "each"],
        ["--kills", "each", "--power", "strict"],
        ["--kills", "none", "--random", "60", "--power", "lucky"],
        ["--kills", "none", "--random", "60"],
        ["--kills", "each", "--action", "enospc"],
    ],
    ids=["killed", "power cut", "power cut, some luck", "killed anywhere", "disk full"],
)
def test_nothing_is_lost_doubled_or_wrong(arguments: list[str]) -> None:
    figures = matrix(*arguments)
    assert (figures["lost"], figures["doubled"], figures["wrong"]) == (0, 0, 0), figures["examples"]
    assert figures["runs"] > 15
    assert figures["deaths"] >= (0 if "enospc" in arguments else figures["runs"])


@pytest.mark.parametrize("care", sorted(SABOTAGES))
def test_a_daemon_that_leaves_a_care_out_is_found(care: str) -> None:
    power = [] if care in ("forgets-claims", "unlinks-first") else ["--power", "strict"]
    figures = matrix("--kills", "each", *power, "--sabotage", care)
    assert figures["lost"] + figures["doubled"] + figures["wrong"] > 0


def test_every_failpoint_is_one_the_matrix_dies_at(tmp_path: Path) -> None:
    written = {
        name for path in DAEMON.rglob("*.py") for name in re.findall(r'failpoint\("([a-z.-]+)"\)', path.read_text())
    }
    assert written - set(traced(tmp_path)) == ELSEWHERE
    assert len(written) > 20
