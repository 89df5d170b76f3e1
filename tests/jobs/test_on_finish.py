"""The owner's command is told of every end of a job, and can harm none."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from abliterate.contract.messages import JobView
from abliterate.contract.states import State
from abliterated.jobs.on_finish import OnFinish


def view(state: State, label: str = "night") -> JobView:
    return JobView(id="j1", label=label, model="m", target="m-abliterated:latest", state=state)


async def test_it_is_told_once_of_each_end_with_no_shell_in_between(tmp_path: Path) -> None:
    told = tmp_path / "told"
    line = "os.environ['ABLITERATED_LABEL'] + chr(10) + sys.stdin.read() + chr(10)"
    code = f"import os, sys; open({str(told)!r}, 'a').write({line})"
    tell = OnFinish([sys.executable, "-c", code])
    for state in ("queued", "running", "registering"):
        tell(view(state), 1)  # type: ignore[arg-type]
    tell(view("succeeded"), 0)  # progress, no transition
    tell(view("failed", "$(touch pwned); `id`"), 7)
    await tell.close()
    label, body = told.read_text().splitlines()
    assert label == "$(touch pwned); `id`"
    assert (json.loads(body)["state"], json.loads(body)["target"]) == ("failed", "m-abliterated:latest")
    tell(view("held"), 8)
    tell(view("succeeded"), 9)
    await tell.close()
    assert len(told.read_text().splitlines()) == 6


@pytest.mark.parametrize("argv", [["/nowhere/at/all"], ["false"], ["sleep", "100"], []])
async def test_a_command_that_fails_or_hangs_harms_nobody(argv: list[str]) -> None:
    tell = OnFinish(argv, patience=0.2)
    tell(view("succeeded"), 1)
    async with asyncio.timeout(60):
        await tell.close()
