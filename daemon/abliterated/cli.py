"""Entry of `abliterated`: finds the verb, turns typed errors into one line and an exit code. Does no work itself."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from abliterate.contract.errors import AbliteratedError, Cancelled, DiskError
from abliterated import __version__

VERBS = (
    "serve",
    "work",
    "direction",
    "apply",
    "export",
    "evaluate",
    "chat",
    "proxy",
    "engine",
    "demo",
    "doctor",
    "repair",
    "undo",
    "install",
    "uninstall",
)
# Those that read a model in this very process.
READING = frozenset({"work", "direction", "apply", "export", "evaluate", "chat"})
DESCRIPTION = """\
abliterated: a sidecar for Ollama. Drop a recipe, get the model back without its refusals.

This is the daemon's command. `abliterate` submits recipes to it and follows them."""
FIRST_STEPS = """\
start here:
  abliterated serve                         the daemon, in a terminal of its own
  abliterated demo --load                   a small model that refuses, brought into the engine, and its recipe
  abliterate submit refuser.toml --watch    the job, followed to its end

`abliterated VERB --help` explains a verb, with examples."""


class _Parser(argparse.ArgumentParser):
    """Says a mistake on the command line as every other error is said."""

    def error(self, message: str) -> NoReturn:
        remedy = f"See: {self.prog} --help"
        if wrong := re.match(r"argument VERB: invalid choice: '(.*?)'", message):
            import difflib

            from abliterate.cli import VERBS as CLIENT_VERBS  # a person may ask for the other command's here

            message = f"no verb {wrong[1]!r}"
            near = [f"abliterated {verb}" for verb in difflib.get_close_matches(wrong[1], VERBS, n=1)]
            meant = [f"abliterate {wrong[1]}"] if wrong[1] in CLIENT_VERBS else near
            remedy = f"Did you mean `{meant[0]}`?" if meant else remedy
        sys.stderr.write(f"abliterated: {message}\n  → {remedy}\n")
        raise SystemExit(2)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(
        prog="abliterated",
        description=DESCRIPTION,
        epilog=FIRST_STEPS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"abliterated {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB")
    for verb in VERBS:
        module = _module(verb)
        sub = verbs.add_parser(
            verb,
            help=module.HELP,
            description=module.HELP,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add(sub)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns its exit code."""
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return 130


def _run(arguments: Sequence[str] | None) -> int:
    top = parser()
    options = top.parse_args(arguments)
    if not options.verb:
        top.print_help()
        return 2
    if options.verb in READING:
        from abliterated.commands.cut_short import name_cut_files

        name_cut_files()
    try:
        code: int = _module(options.verb).run(options)
    except Cancelled as error:
        # The queue keeps a job's stages; here they went with the run.
        remedy = "Run it again: what was downloaded is kept, the rest is made anew"
        sys.stderr.write(f"abliterated: {error.message}\n  → {remedy}\n")
        return error.exit_code
    except AbliteratedError as error:
        sys.stderr.write(f"abliterated: {error.message}\n")
        if error.remedy:
            sys.stderr.write(f"  → {error.remedy}\n")
        return error.exit_code
    except ModuleNotFoundError as error:
        sys.stderr.write(f"abliterated: this needs {error.name}, which is not installed\n")
        sys.stderr.write("  → pip install 'abliterated[pipeline]'\n")
        return 1
    except OSError as error:
        # What no room foresaw: still one line, and what it was about.
        where = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"abliterated: {where}{error.strerror or error}\n  → Check the path, its owner and the disk\n")
        return DiskError.exit_code
    return code


def _module(verb: str) -> ModuleType:
    return importlib.import_module(f"abliterated.commands.{verb}")


if __name__ == "__main__":
    sys.exit(main())
