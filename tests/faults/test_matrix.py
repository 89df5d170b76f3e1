"""A death at every place a daemon can die, with and without what the disk had not yet: nothing lost, doubled or wrong.

`make nightly` does all ordered pairs and a thousand random ones as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


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
    told = subprocess.run(
        [sys.executable, "-m", "faults.matrix", *arguments],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=170,
    )
    figures = json.loads(told.stdout[told.stdout.index("{") :])
    assert (figures["lost"], figures["doubled"], figures["wrong"]) == (0, 0, 0), figures["examples"]
    assert figures["runs"] > 15
    assert figures["deaths"] >= (0 if "enospc" in arguments else figures["runs"])
