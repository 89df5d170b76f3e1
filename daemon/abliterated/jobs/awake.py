"""Keeps the machine from sleeping while a job runs: systemd-inhibit or caffeinate, where one is found and allowed.

The helper holds a pipe of ours and ends with us. Does not know jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import sys

log = logging.getLogger(__name__)


def command(platform: str = sys.platform) -> list[str]:
    """What to run; empty where there is nothing. It ends at the end of its stdin."""
    if platform == "darwin" and shutil.which("caffeinate"):
        return ["caffeinate", "-i", "cat"]
    if platform.startswith("linux") and shutil.which("systemd-inhibit"):
        return [
            "systemd-inhibit",
            "--what=sleep:idle",
            "--mode=block",
            "--who=abliterated",
            "--why=a model is being made",
            "cat",
        ]
    return []


class Awake:
    """`keep(True)` while something runs, `keep(False)` when nothing does; both as often as one likes."""

    def __init__(self, argv: list[str] | None = None) -> None:
        self._argv = command() if argv is None else argv
        self._process: asyncio.subprocess.Process | None = None

    async def keep(self, wanted: bool) -> None:
        if wanted and self._process is None and self._argv:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *self._argv,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as error:
                log.info("the machine may fall asleep: %s", error, extra={"action": "awake"})
                self._argv = []
        elif not wanted and self._process is not None:
            process, self._process = self._process, None
            if process.stdin:
                process.stdin.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 2)
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
