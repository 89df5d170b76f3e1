"""Where the daemon is, from the options and the configuration. Reads `config.toml`; asks nobody."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from abliterate.contract.config import control_socket, default_config_file, home, load_config, local_path
from abliterate.contract.paths import Home

if TYPE_CHECKING:
    from abliterate.api import Daemon


@dataclass(frozen=True)
class Whereabouts:
    """The control socket, and the home behind it: None where only a socket was named, so that nothing lands in the
    in-tray of another daemon."""

    socket: Path
    home: Home | None


def whereabouts(args: argparse.Namespace) -> Whereabouts:
    """Where the daemon is that `args` (or the environment) name."""
    named = local_path(args.config) if args.config else None
    if args.socket and not named and not default_config_file().exists():
        return Whereabouts(local_path(args.socket), None)
    config = load_config(named)
    socket = control_socket(config)
    if args.socket:
        other = local_path(args.socket)
        # A configuration that names this very socket, or was given beside it, tells the home too.
        return Whereabouts(other, home(config) if named or other == socket else None)
    return Whereabouts(socket, home(config))


def daemon(args: argparse.Namespace) -> Daemon:
    """The daemon that `args` name."""
    from abliterate.api import Daemon

    return Daemon(whereabouts(args).socket)
