"""Where things lie: systemd's directories first, then XDG variables, then the platform's own.

Both sides compute the same answer from the same environment. Creates nothing, reads nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

APP = "abliterated"


@dataclass(frozen=True)
class Directories:
    """The folders of one installation."""

    config: Path
    state: Path
    cache: Path
    runtime: Path


def directories(environ: Mapping[str, str] | None = None) -> Directories:
    """The folders for this user (or this systemd unit)."""
    env = os.environ if environ is None else environ
    runtime = _first(env, "RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR")
    state = _first(env, "STATE_DIRECTORY", "XDG_STATE_HOME") or _platform("user_state_path")
    return Directories(
        config=_first(env, "CONFIGURATION_DIRECTORY", "XDG_CONFIG_HOME") or _platform("user_config_path"),
        state=state,
        cache=_first(env, "CACHE_DIRECTORY", "XDG_CACHE_HOME") or _platform("user_cache_path"),
        runtime=runtime or state / "run",
    )


@dataclass(frozen=True)
class Home:
    """What lies below the state folder and the spool."""

    state: Path
    spool: Path

    @property
    def incoming(self) -> Path:
        return self.spool / "incoming"

    @property
    def rejected(self) -> Path:
        return self.spool / "rejected"

    @property
    def jobs(self) -> Path:
        return self.state / "jobs"

    @property
    def journal(self) -> Path:
        return self.state / "journal.sqlite3"

    @property
    def locks(self) -> Path:
        return self.state / "locks"

    @property
    def daemon_lock(self) -> Path:
        return self.state / "daemon.lock"

    @property
    def engine_models(self) -> Path:
        return self.state / "models"


def _first(env: Mapping[str, str], systemd: str, xdg: str) -> Path | None:
    """systemd's variable names our own folder (the first of a list); an XDG variable names its parent."""
    if value := env.get(systemd):
        return Path(value.split(":")[0])
    if value := env.get(xdg):
        return Path(value) / APP
    return None


_LINUX: bool = sys.platform == "linux"
_XDG_DEFAULTS = {"user_config_path": ".config", "user_state_path": ".local/state", "user_cache_path": ".cache"}


def _platform(attribute: str) -> Path:
    if _LINUX:
        # The specification's own defaults, as platformdirs has them; its import is a tenth of the client's start.
        return Path.home() / _XDG_DEFAULTS[attribute] / APP
    import platformdirs

    path: Path = getattr(platformdirs, attribute)(APP, appauthor=False)
    return path
