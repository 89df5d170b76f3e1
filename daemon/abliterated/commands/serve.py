"""`abliterated serve`: the daemon."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "run the daemon: queue, proxy and control socket (what the service units run)"
EXAMPLES = """\
examples:
  abliterated serve
  abliterated serve --config ~/.config/abliterated/config.toml

Stops cleanly on SIGTERM or Ctrl-C; a running job goes on where it was at the next start.
exit codes: 0 stopped; 2 wrong configuration; 4 a folder can't be made; 75 port or home taken."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="configuration (default: $ABLITERATED_CONFIG, or the user's)"
    )
    parser.add_argument(
        "--log-level", default="INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"), help="default INFO"
    )
    parser.add_argument("--parent-fd", type=int, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    from abliterate.contract.config import control_socket, home, load_config
    from abliterated import logs
    from abliterated.daemon_lock import refuse_if_taken

    logs.set_up(options.log_level)
    config = load_config(options.config)
    refuse_if_taken(home(config).daemon_lock)
    # A second daemon is told so before the rooms are loaded.
    from abliterated import app

    return app.run(config, home(config), control_socket(config), options.parent_fd)
