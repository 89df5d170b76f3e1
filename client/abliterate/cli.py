"""The entry of `abliterate`: finds the verb, runs it, and turns a typed error into lines on stderr and an exit code.

Only the asked verb's module is imported. Does not know what a verb does, nor the daemon.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

from abliterate.contract.errors import AbliteratedError
from abliterate.render import clean

if TYPE_CHECKING:
    from types import ModuleType

VERBS: Final[dict[str, str]] = {
    "submit": "queue a recipe, or a model with the default recipe",
    "status": "show the queue, or one job",
    "logs": "print a job's log, or follow it",
    "report": "what a job did to its model, as text, page or JSON",
    "wait": "wait until jobs have ended; the exit code tells how",
    "cancel": "stop jobs, or take them out of the queue",
    "hold": "keep queued jobs from starting",
    "release": "let held jobs start again",
    "retry": "queue failed or cancelled jobs again",
    "models": "list the models made here, with what they were made from",
    "doctor": "say what is wrong with a model, or with this installation",
    "repair": "give a model back what its base has, or undo that",
    "undo": "remove a model made here, and say what space that freed",
    "pause": "start no further job; a running one goes on",
    "resume": "start jobs again",
    "drain": "stop the jobs at work and start none: for an upgrade or a reboot",
    "clean": "forget jobs that ended long ago, and what they left",
    "new": "write a commented recipe to stdout",
    "check": "validate recipes, touching nothing else",
    "chat": "talk to a model",
    "compare": "put the same prompts to a model and its base",
    "ui": "serve a read-only page of all this on a loopback port",
    "import-config": "turn ollama-forge's configuration into a recipe",
    "download-lists": "fetch public prompt lists, their licences shown first",
    "completions": "print the completions for a shell",
}

# Those of the other command, which a person may ask here.
DAEMON_VERBS: Final = frozenset(
    "serve work direction apply export evaluate proxy engine demo install uninstall".split()
)

_DESCRIPTION: Final = "Queue recipes with the abliterated daemon, and follow them to a model in Ollama."
_EPILOG: Final = """\
start here:
  abliterated serve                         the daemon, in a terminal of its own (abliterated install: a service)
  abliterated demo --load                   a small model that refuses, to try all this on, and its recipe
  abliterate submit refuser.toml --watch    the job, followed to its end
  abliterate submit qwen3:8b --watch        qwen3-abliterated:8b is in Ollama when it ends
  abliterate new qwen3:8b > recipe.toml     a recipe of your own, every key explained
  abliterate status                         what runs, what waits, and why

exit codes:
  0 done · 1 failed · 2 a recipe or an option is wrong · 4 disk · 6 conflict · 7 no such job
  8 done, but short of search.refusal_target · 69 the daemon does not answer · 86 cancelled
  124 waited too long · 130 interrupted

`abliterate VERB --help` explains a verb, with examples.
"""


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help of one width everywhere, so that the reference can be compared with it."""

    def __init__(self, prog: str, **_: Any) -> None:
        super().__init__(prog, width=100, max_help_position=26)


class VerbParser(argparse.ArgumentParser):
    """A parser that reads its verb's module only when the verb is asked for."""

    def __init__(self, *args: Any, verb: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": Formatter, "allow_abbrev": False, **kwargs})
        self._verb = verb
        self.intermixed = False  # whether options may stand between positional arguments; a verb's to say

    def load(self) -> VerbParser:
        """Let the verb's module add its arguments; once."""
        verb, self._verb = self._verb, ""
        if verb:
            _module(verb).configure(self)
            _add_whereabouts(self, argparse.SUPPRESS)
        return self

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.load()
        if self.intermixed:
            self.intermixed = False  # it asks this method again, twice
            try:
                return self.parse_known_intermixed_args(args, namespace)
            finally:
                self.intermixed = True
        return super().parse_known_args(args, namespace)

    def unrecognized(self, words: Sequence[str]) -> NoReturn:
        """End because of arguments that are none of ours, with the option that was perhaps meant."""
        option = next((word for word in words if word.startswith("-")), "").partition("=")[0]
        near = _near(option, self._option_string_actions) if option else ""
        what = f"no option {option}" if option else f"too much: {' '.join(words)}"
        _complain(what, f"Did you mean {near}?" if near else f"See: {self.prog} --help")
        raise SystemExit(2)

    def error(self, message: str) -> NoReturn:
        remedy = f"See: {self.prog} --help"
        if wrong := re.match(r"argument VERB: invalid choice: '(.*?)'", message):
            message, near = f"no verb {wrong.group(1)!r}", _near(wrong.group(1), VERBS)
            meant = f"abliterated {wrong.group(1)}" if wrong.group(1) in DAEMON_VERBS else near and f"abliterate {near}"
            remedy = f"Did you mean `{meant}`?" if meant else remedy
        _complain(message, remedy)
        raise SystemExit(2)


def build_parser() -> tuple[VerbParser, dict[str, VerbParser]]:
    """The whole command line, and each verb's parser (its arguments not yet loaded)."""
    parser = VerbParser(prog="abliterate", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    _add_whereabouts(parser, None)
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", parser_class=VerbParser)
    made = {name: verbs.add_parser(name, help=summary, verb=name) for name, summary in VERBS.items()}
    return parser, made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")  # a narrow locale must not break a status
    parser, verbs = build_parser()
    args, more = parser.parse_known_args(argv)
    if more:
        verbs.get(args.verb, parser).unrecognized(more)
    try:
        if args.version:
            from abliterate import __version__

            sys.stdout.write(f"abliterate {__version__}\n")
            return 0
        if not args.verb:
            parser.print_help()
            return 2
        code: int = _module(args.verb).run(args)
        sys.stdout.flush()
        return code
    except AbliteratedError as error:
        sys.stdout.flush()
        _complain(error.message, error.remedy)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has left; nothing may be flushed into the pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _module(verb: str) -> ModuleType:
    _import_msgspec()
    return import_module(f"abliterate.commands.{verb.replace('-', '_')}")


def _import_msgspec() -> None:
    """Import msgspec without typing_extensions: it asks that first for what Python ≥ 3.11 has in typing, and falls
    back by itself; the import costs a sixth of a cold start."""
    modules = cast("dict[str, ModuleType | None]", sys.modules)
    if "msgspec" in modules or "typing_extensions" in modules:
        return
    modules["typing_extensions"] = None
    try:
        import_module("msgspec")
    finally:
        del modules["typing_extensions"]


def _add_whereabouts(parser: argparse.ArgumentParser, default: Any) -> None:
    group = parser.add_argument_group("where the daemon is")
    group.add_argument(
        "--config", metavar="FILE", default=default, help="the daemon's config.toml (also $ABLITERATED_CONFIG)"
    )
    group.add_argument("--socket", metavar="PATH", default=default, help="the daemon's control socket")


def _near(word: str, known: Iterable[str]) -> str:
    import difflib

    return next(iter(difflib.get_close_matches(word, list(known), n=1)), "")


def _complain(message: str, remedy: str) -> None:
    first, *more = message.splitlines() or [""]
    lines = [f"abliterate: {clean(first)}", *(f"  {clean(line)}" for line in more)]
    if remedy:
        lines.append(f"  → {clean(remedy)}")
    sys.stderr.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
