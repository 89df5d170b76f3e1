"""`abliterated uninstall`: the service away, Ollama back on its port."""

from __future__ import annotations

import argparse

from abliterated.commands.install import carry, found

HELP = "remove the service and give Ollama its port back; jobs and models stay"
EXAMPLES = """\
examples:
  abliterated uninstall --user
  sudo abliterated uninstall --system --dry-run

exit codes: 0 done; 1 a step failed; 2 wrong option."""


def add(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--user", action="store_true", help="a service of yours (default, unless you are root)")
    where.add_argument("--system", action="store_true", help="a service of the machine's")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be done")


def run(options: argparse.Namespace) -> int:
    from abliterated.install.plan import uninstall

    facts = found(options)
    return carry(facts, uninstall(facts), options.dry_run)
