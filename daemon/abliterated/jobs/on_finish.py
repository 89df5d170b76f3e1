"""`jobs.on_finish`: a command of the owner's, started when a job has ended or is held: a notice, a mail, a copy.

No shell; the job comes as environment variables and as JSON on stdin. Told once at most: a daemon that dies in that
moment tells nobody. Its failure is the log's business, never the job's. Does not know the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Sequence

import msgspec

from abliterate.contract.messages import JobView
from abliterate.contract.states import TERMINAL

log = logging.getLogger(__name__)

TOLD = TERMINAL | {"held"}
PATIENCE = 60.0


class OnFinish:
    """Called with every change of a job, as published; starts the command after those that end one."""

    def __init__(self, argv: Sequence[str], patience: float = PATIENCE) -> None:
        self._argv = list(argv)
        self._patience = patience
        self._running: set[asyncio.Task[None]] = set()

    def __call__(self, view: JobView, number: int) -> None:
        if self._argv and number and view.state in TOLD:
            task = asyncio.get_running_loop().create_task(self._tell(view), name=f"on_finish {view.id}")
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def close(self) -> None:
        """Wait for those under way."""
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _tell(self, view: JobView) -> None:
        told = {
            "ABLITERATED_JOB": view.id,
            "ABLITERATED_LABEL": view.label,
            "ABLITERATED_STATE": view.state,
            "ABLITERATED_REASON": view.reason,
            "ABLITERATED_MODEL": view.target,
        }
        try:
            process = await asyncio.create_subprocess_exec(
                *self._argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                env={**os.environ, **told},
                start_new_session=True,
            )
        except OSError as error:
            log.warning("on_finish: %s: %s", self._argv[0], error.strerror, extra={"action": "on_finish"})
            return
        try:
            await asyncio.wait_for(process.communicate(msgspec.json.encode(view)), self._patience)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if process.returncode:
            log.warning("on_finish: %s ended with %s", self._argv[0], process.returncode, extra={"action": "on_finish"})
