"""`abliterated install`: the daemon as a service, beside Ollama."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from abliterated.install.plan import Facts

HELP = "make the daemon a service: units, sockets, and Ollama moved aside"
EXAMPLES = """\
examples:
  abliterated install --user --dry-run      what it would do, file by file
  abliterated install --user                for you alone
  sudo abliterated install --system         for everybody; recipes from the group abliterated

Says each thing it does. A step that fails takes back those before it. Doing it twice changes nothing.
exit codes: 0 done; 1 a step failed and all was taken back; 2 wrong option."""


def add(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--user", action="store_true", help="a service of yours (default, unless you are root)")
    where.add_argument("--system", action="store_true", help="a service of the machine's")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be done")
    parser.add_argument("--program", metavar="FILE", help="the abliterated the service runs (default: this one)")


def run(options: argparse.Namespace) -> int:
    from abliterated.install.plan import install

    facts = found(options)
    return carry(facts, install(facts), options.dry_run)


def found(options: argparse.Namespace) -> Facts:
    """The facts for the installation that is meant. Raises RecipeError."""
    from abliterate.contract.errors import RecipeError
    from abliterated.install.facts import find
    from abliterated.install.machine import ThisMachine, is_root

    kind: Literal["system", "user", "mac"] = "system" if options.system or (is_root() and not options.user) else "user"
    if sys.platform == "darwin":
        if options.system:
            raise RecipeError("--system: on a Mac it is an agent of the user's", remedy="abliterated install --user")
        kind = "mac"
    if kind == "system" and not is_root() and not options.dry_run:
        raise RecipeError("--system needs root", remedy="sudo abliterated install --system, or --user")
    return find(kind, ThisMachine(), getattr(options, "program", None) or "")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def carry(facts: Facts, steps: list, dry_run: bool) -> int:  # type: ignore[type-arg]
    """Do the steps, or print them."""
    from abliterated.install.machine import ThisMachine, carry_out, described

    if dry_run:
        sys.stdout.write("\n".join(described(steps)) + "\n")
        return 0
    carry_out(steps, ThisMachine(), _say)
    sys.stdout.write("done\n")
    return 0
