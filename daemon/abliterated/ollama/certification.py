"""Starts a certification as a process of its own and takes its word: whatever it does, the daemon goes on.

Does not know what is certified, nor what follows from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import msgspec

from abliterate.contract.errors import EngineRefused, EngineUnavailable, NotFound
from abliterate.contract.messages import ErrorBody
from abliterated.ollama.certify import Certificate

LONGEST = 1800.0  # loading two large models from a slow disk; a demo's takes a second or two


class CertificationUnfinished(EngineUnavailable):
    """It took too long, or the process fell: another try may end, but not for ever so many."""


async def certify_apart(
    url: str,
    model: str,
    reference: str = "",
    *,
    product: Path | None = None,
    baked: bool = False,
    seconds: float = LONGEST,
) -> Certificate:
    """The certificate of `model`. Raises CertificationUnfinished where it gave none in time, EngineUnavailable where
    the engine is away, else EngineRefused or NotFound."""
    command = [sys.executable, "-m", "abliterated.ollama.certify_run", "--url", url, "--model", model]
    command += ["--reference", reference] if reference else []
    command += ["--product", str(product)] if product else []
    process = await asyncio.create_subprocess_exec(
        *command,
        *(["--baked"] if baked else []),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        said, complaint = await asyncio.wait_for(process.communicate(), seconds)
    except TimeoutError as error:
        raise CertificationUnfinished(
            f"{model}: its certification did not end in {seconds:.0f} s",
            remedy="The engine may be busy; it is tried again",
        ) from error
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    try:
        if process.returncode == 0:
            return msgspec.json.decode(said, type=Certificate)
        body = msgspec.json.decode(said, type=ErrorBody)
    except msgspec.MsgspecError as error:
        last = (complaint.decode(errors="replace").strip().splitlines() or ["no word"])[-1]
        raise CertificationUnfinished(
            f"{model}: the certifier ended with {process.returncode} ({last[:200]})", remedy="It is tried again"
        ) from error
    if body.exit_code == EngineUnavailable.exit_code:
        raise EngineUnavailable(body.error, remedy=body.remedy)
    kind = NotFound if body.exit_code == NotFound.exit_code else EngineRefused
    raise kind(body.error, remedy=body.remedy)
