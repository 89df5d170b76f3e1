"""The daemon's settings, made ready: folders with their modes, the engine's kind, what a spooled recipe may name.

`contract/config.py` reads the file; this room decides what follows from it on this machine. Does not start anything.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from abliterate.contract.config import Config, local_path
from abliterate.contract.errors import DiskError, RecipeError
from abliterate.contract.matrix import expand
from abliterate.contract.paths import Home
from abliterate.contract.recipe import Recipe
from abliterated.files import sync_folder

EngineKind = Literal["ollama", "embedded"]
UNIT_PLACES = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
MAC_APPS = ("/Applications/Ollama.app",)


def prepare_home(home: Home) -> None:
    """Create the folders. Raises DiskError that names the one that can't be."""
    for folder, mode in (
        (home.state, 0o750),
        (home.jobs, 0o750),
        (home.locks, 0o770),
        (home.spool, 0o750),
        (home.incoming, 0o770),
        (home.rejected, 0o770),
    ):
        try:
            if not folder.is_dir():
                folder.mkdir(parents=True, exist_ok=True, mode=mode)
                # What will be promised to last must not lie in a folder that a power cut takes away.
                sync_folder(folder.parent)
        except OSError as error:
            raise DiskError(
                f"{folder}: can't be created ({error.strerror})", remedy="Check paths in config.toml"
            ) from error


@dataclass(frozen=True)
class Surroundings:
    """What tells whether this machine has an Ollama."""

    executable: bool
    unit: bool
    listening: bool


def surroundings(upstream: str) -> Surroundings:
    """Look for an Ollama: an executable, a unit of it, somebody who listens where it should."""
    units = any((Path(place) / "ollama.service").exists() for place in UNIT_PLACES)
    apps = sys.platform == "darwin" and any(Path(app).exists() for app in MAC_APPS)
    return Surroundings(shutil.which("ollama") is not None, units or apps, listening(upstream))


def engine_kind(config: Config, found: Surroundings) -> EngineKind:
    """Which engine to work with; the embedded one only where there is no trace of an Ollama."""
    if config.engine.kind != "auto":
        return config.engine.kind
    return "ollama" if found.executable or found.unit or found.listening else "embedded"


def listening(url: str) -> bool:
    """Whether somebody accepts connections at `url`."""
    parts = urlsplit(url)
    try:
        with socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 80), timeout=0.5):
            return True
    except OSError:
        return False


async def until_listening(url: str, seconds: float = 10.0) -> bool:
    """Wait until somebody accepts connections at `url`, at most so long."""
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(listening, url):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.05)
    return True


def check_spooled(recipe: Recipe, roots: list[str]) -> None:
    """Refuse what a spooled recipe must not name: a path outside the configured roots, a relative path.

    Whoever can write to the spool chooses what the daemon reads; `[paths] models` says what that may be.
    Raises RecipeError with the key and the remedy.
    """
    allowed = [local_path(root).resolve() for root in roots]
    # Each once, however many of a matrix's jobs share it.
    jobs = expand(recipe)
    unlike = {(one.model, *map(id, (one.prompts, one.direction, one.run, one.evaluate))): one for one in jobs}
    named = dict.fromkeys(pair for one in unlike.values() for pair in _named(one))
    for key, value in named:
        path = Path(value)
        if not path.is_absolute():
            raise RecipeError(f"{key}: {value!r} is relative", remedy="Give the whole path; `abliterate submit` does")
        resolved = path.resolve()
        if not any(resolved.is_relative_to(root) for root in allowed):
            raise RecipeError(
                f"{key}: {value!r} lies outside the folders a spooled recipe may name",
                remedy="Add its folder to [paths] models in config.toml, or use `abliterated work`",
            )


def _named(recipe: Recipe) -> list[tuple[str, str]]:
    """Every file the recipe names, with its key."""
    named = {"direction.file": [recipe.direction.file], "run.from_checkpoint": [recipe.run.from_checkpoint]}
    if not recipe.model.startswith(("ollama:", "hf:")):
        named["model"] = [recipe.model]
    for key in ("harmful", "harmless"):
        value = getattr(recipe.prompts, key)
        named[f"prompts.{key}"] = [value] if isinstance(value, str) else list(value)
    named["prompts.atoms"] = list(recipe.prompts.atoms)
    # A suite's bare name is one of those built in; what else is written there is a file.
    named["evaluate.suites"] = [name for name in recipe.evaluate.suites if not name.replace("-", "").isalpha()]
    return [
        (key, value)
        for key, values in named.items()
        for value in values
        if value not in ("", "builtin") and not value.startswith("hf:")
    ]
