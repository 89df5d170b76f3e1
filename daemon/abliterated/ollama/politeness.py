"""Room on the device before a job, without rudeness: wait for those who are being answered, then unload what is loaded.

Afterwards nothing stays changed: a model that was loaded for ever is loaded again. Nothing here may fail a job: an
engine that does not answer holds no memory that asking could free. Does not know jobs, nor whose device it is.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from abliterate.contract.errors import AbliteratedError
from abliterated.ollama.client import OllamaClient

log = logging.getLogger(__name__)

IDLE_SECONDS = 60.0  # as long we wait for requests to end; the engine itself waits for the rest
UNLOAD_SECONDS = 60.0
FREE_SECONDS = 10.0
POLL_SECONDS = 0.2
FOR_EVER = datetime.timedelta(days=365)  # a model kept loaded longer was pinned by somebody


@dataclass(frozen=True)
class Evicted:
    """A model that was unloaded. `pinned`: it was to stay for ever, so it is loaded again afterwards."""

    name: str
    pinned: bool = False


async def make_room(
    client: OllamaClient,
    *,
    busy: Callable[[], bool] = lambda: False,
    used: Callable[[], int | None] | None = None,
    patience: float = IDLE_SECONDS,
) -> list[Evicted]:
    """Wait until nobody is answered (bounded), unload every model, wait until the memory is free. Never raises ours.

    `used`: megabytes of the device's memory in use, None where nobody can tell; it is called in a thread.
    """
    await _until(lambda: not busy(), patience)
    evicted: list[Evicted] = []
    try:
        for row in await client.ps():
            name = str(row.get("name") or "")
            if not name:
                continue
            gone = await client.unload(name, seconds=UNLOAD_SECONDS)
            evicted.append(Evicted(name, _pinned(row)))
            log.info(
                "%s: %s", name, "unloaded" if gone else "is asked to go, but still busy", extra={"action": "unload"}
            )
        if evicted:
            await _memory_settles(used or used_megabytes)
    except AbliteratedError as error:
        log.warning("no room could be asked for: %s", error, extra={"action": "unload"})
    return evicted


async def restore(client: OllamaClient, evicted: list[Evicted]) -> None:
    """Load again what had been loaded for ever. Never raises ours."""
    for model in evicted:
        if model.pinned:
            try:
                await client.load(model.name, keep_alive=-1)
            except AbliteratedError as error:
                log.warning("%s: could not be loaded again: %s", model.name, error, extra={"action": "reload"})


def used_megabytes() -> int | None:
    """Memory in use over all GPUs, as nvidia-smi says; None without one. Blocking."""
    if not shutil.which("nvidia-smi"):
        return None
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=10,
        )
        return sum(int(line) for line in told.stdout.split())
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None


async def _memory_settles(used: Callable[[], int | None]) -> None:
    """Until two readings in a row don't fall any more: drivers give memory back a moment after a process ends."""
    deadline = asyncio.get_running_loop().time() + FREE_SECONDS
    before = await asyncio.to_thread(used)
    still = 0
    while before is not None and still < 2 and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(POLL_SECONDS)
        now = await asyncio.to_thread(used)
        still = still + 1 if now is not None and now >= before else 0
        before = now


async def _until(good: Callable[[], bool], seconds: float) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < deadline:
        if good():
            return
        await asyncio.sleep(POLL_SECONDS)


def _pinned(row: dict[str, Any]) -> bool:
    try:
        expires = datetime.datetime.fromisoformat(str(row.get("expires_at")).replace("Z", "+00:00"))
    except ValueError:
        return False
    now = datetime.datetime.now(datetime.UTC)
    if expires.tzinfo is None:
        expires = expires.replace(tzinfo=datetime.UTC)
    return expires - now > FOR_EVER
