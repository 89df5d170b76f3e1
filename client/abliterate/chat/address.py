"""Where models are asked: `--host`, `$OLLAMA_HOST`, the daemon's proxy, or Ollama's own port. Does not ask them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from abliterate.contract.errors import AbliteratedError, RecipeError

if TYPE_CHECKING:
    import argparse

PORT: Final = 11434
_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Address:
    """An engine's address; `path` is what stands before `/api`."""

    host: str = "127.0.0.1"
    port: int = PORT
    secure: bool = False
    path: str = ""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.secure else ''}://{host}:{self.port}{self.path}"


def parse_address(text: str, source: str = "--host") -> Address:
    """Read an address as Ollama reads OLLAMA_HOST: any part may be missing. Raises RecipeError."""
    given = text.strip().strip("\"'")
    scheme, mark, _ = given.partition("://")
    try:
        parts = urlsplit(given if mark else f"//{given}")
        port = parts.port
    except ValueError as error:
        raise RecipeError(f"{source}: {text!r} is no address ({error})", remedy="As in 127.0.0.1:11434") from error
    if mark and scheme not in _PORTS:
        raise RecipeError(f"{source}: {scheme} is not spoken", remedy="Begin it with http:// or https://")
    # Who listens everywhere is reached here.
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(parts.hostname or "", parts.hostname or "")  # noqa: S104
    default = _PORTS[scheme] if mark else PORT
    return Address(host, port or default, scheme == "https", parts.path.rstrip("/"))


def find_address(args: argparse.Namespace, environ: Mapping[str, str] | None = None) -> Address:
    """The engine that `args` or the environment name, else what the daemon says it serves, else Ollama's port."""
    env = os.environ if environ is None else environ
    if args.host:
        return parse_address(args.host)
    if (named := env.get("OLLAMA_HOST", "").strip()) and not (args.config or args.socket):
        return parse_address(named, "OLLAMA_HOST")
    return _proxy(args) or Address()


def _proxy(args: argparse.Namespace) -> Address | None:
    """The daemon's proxy: asked of the daemon, and of its configuration where it is down."""
    from abliterate.api import Daemon
    from abliterate.contract.config import default_config_file, load_config, local_path
    from abliterate.settings import whereabouts

    try:
        listen = Daemon(whereabouts(args).socket, timeout=2).status().proxy
    except AbliteratedError:
        if not args.config and not default_config_file().exists():
            return None
        listen = load_config(local_path(args.config) if args.config else None).proxy.listen
    return parse_address(listen, "proxy.listen") if listen else None
