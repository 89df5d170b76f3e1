"""`config.toml`: the daemon's settings, every key with a default; the client reads the socket and the spool from it.

Does not know how a setting is used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, field

from abliterate.contract.errors import RecipeError
from abliterate.contract.paths import Directories, Home, directories
from abliterate.contract.schema import Problem, build, raise_problems
from abliterate.contract.toml_source import parse_toml


class Paths(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[paths]`: empty means the platform's own place."""

    state: str = ""
    spool: str = ""
    models: list[str] = field(default_factory=list)


class ProxySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[proxy]`: what stands on Ollama's port."""

    listen: str = "127.0.0.1:11434"
    upstream: str = "http://127.0.0.1:11435"
    patterns: list[str] = field(default_factory=lambda: ["*-abliterated"])
    aliases: dict[str, str] = field(default_factory=dict)
    during_jobs: Literal["share", "hold", "reject"] = "share"
    hold_seconds: Annotated[float, Meta(ge=0, le=86_400)] = 60
    auto_submit: bool = False
    assist: Literal["off", "needed", "any"] = "needed"
    assist_more: list[Literal["tool_choice", "parallel_tool_calls", "thinking_history"]] = field(default_factory=list)
    allow_remote: bool = False
    allowed_hosts: list[str] = field(default_factory=list)
    access_log: str = ""


class Upstream(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[[upstream]]`: further Ollamas, a table each, and the names they serve."""

    pattern: str
    url: str


class EngineSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[engine]`: what serves the models."""

    kind: Literal["auto", "ollama", "embedded"] = "auto"


class Jobs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[jobs]`: how they are run, and what is kept of them."""

    executor: Literal["local", "ray"] = "local"
    retries: Annotated[int, Meta(ge=0, le=100)] = 5
    keep_days: Annotated[int, Meta(ge=0, le=36_500)] = 90
    on_finish: list[str] = field(default_factory=list)


class Ray(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[ray]`: for `jobs.executor = "ray"`."""

    address: Annotated[str, Meta(pattern=r"^https?://[^/@\s]+/?$")] = "http://127.0.0.1:8265"
    python: Annotated[str, Meta(min_length=1, max_length=4096)] = "python3"
    cpus: Annotated[float, Meta(ge=0, le=10_000)] = 1
    gpus: Annotated[float, Meta(ge=0, le=1000)] = 1
    jobs: Annotated[int, Meta(ge=1, le=1000)] = 1


class Control(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[control]`: where the daemon answers its client."""

    socket: str = ""
    tcp: str = ""


class Tools(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[tools]`: programs of the user's that the pipeline may start."""

    converter: str = ""


class Trust(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[trust]`: the only place where remote code can be allowed, by repository and commit."""

    remote_code: list[str] = field(default_factory=list)


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of `config.toml`."""

    paths: Paths = Paths()
    proxy: ProxySettings = ProxySettings()
    upstream: list[Upstream] = field(default_factory=list)
    engine: EngineSettings = EngineSettings()
    jobs: Jobs = Jobs()
    ray: Ray = Ray()
    control: Control = Control()
    tools: Tools = Tools()
    trust: Trust = Trust()


_REMOTE = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")


def default_config_file(environ: Mapping[str, str] | None = None) -> Path:
    """`$ABLITERATED_CONFIG`, or `config.toml` in the configuration folder."""
    env = os.environ if environ is None else environ
    return Path(env.get("ABLITERATED_CONFIG") or directories(env).config / "config.toml")


def load_config(file: Path | None = None) -> Config:
    """Read the configuration; the default file may be missing, a named one may not. Raises RecipeError."""
    path = file or default_config_file()
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        if file is None and not os.environ.get("ABLITERATED_CONFIG"):
            return Config()
        raise RecipeError(
            f"{path}: no such configuration file", remedy="Check --config and $ABLITERATED_CONFIG"
        ) from error
    except OSError as error:
        raise RecipeError(f"{path}: can't be read ({error.strerror})", remedy="Check its permissions") from error
    return parse_config(data, str(path))


def parse_config(data: bytes, source: str = "config.toml") -> Config:
    """Read a configuration from TOML bytes. Raises RecipeError that names every problem."""
    table, text = parse_toml(data, source)
    config, problems = build(Config, table)
    if config is not None:
        problems = [
            Problem("trust.remote_code", f"{entry!r} is not pinned", "Write org/repo@<40 hex digits of the commit>")
            for entry in config.trust.remote_code
            if not _REMOTE.fullmatch(entry)
        ]
    raise_problems(source, text, problems)
    assert config is not None
    return config


def local_path(text: str) -> Path:
    """`text` as a path of this machine, `~` and `~user` resolved. Raises RecipeError where there is no such user."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise RecipeError(f"{text}: no such user's home", remedy="Write the path in full") from error


def home(config: Config, dirs: Directories | None = None) -> Home:
    """The state and spool folders this configuration names."""
    found = dirs or directories()
    state = local_path(config.paths.state) if config.paths.state else found.state
    spool = local_path(config.paths.spool) if config.paths.spool else state / "spool"
    return Home(state=state, spool=spool)


def control_socket(config: Config, dirs: Directories | None = None) -> Path:
    """Where the daemon answers its client."""
    if config.control.socket:
        return local_path(config.control.socket)
    found = dirs or directories()
    if config.paths.state and "RUNTIME_DIRECTORY" not in os.environ:
        # A daemon with a home of its own gets a socket of its own.
        return local_path(config.paths.state) / "control.sock"
    return found.runtime / "control.sock"
