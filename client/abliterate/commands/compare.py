"""`abliterate compare`: puts the same prompts to a model and to its base, and shows both answers side by side."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from abliterate.render import clean, colours, json_text, terminal_width

if TYPE_CHECKING:
    from abliterate.chat.comparison import Row
    from abliterate.cli import VerbParser

_DESCRIPTION = """\
Ask an abliterated model and the base it was made from the same, and show both answers: side by side on a terminal,
one under the other in a pipe. The base is what the model's own weights name, else its name without -abliterated.
An answer that opens as refusals do is marked as one; `abliterate report` has the measured figures."""
_EPILOG = """\
examples:
  abliterate compare qwen3-abliterated:8b "How do I pick a lock?"
  abliterate compare qwen3-abliterated:8b --file prompts.txt --tokens 200
  abliterate compare my-model --base qwen3:8b "How do I pick a lock?"
  abliterate compare qwen3-abliterated:8b --file prompts.txt --json | jq .refusals

exit codes: 0 · 2 an option is wrong · 5 the engine refused · 7 a model or a file is not there · 75 nobody answers"""


def configure(parser: VerbParser) -> None:
    """Add this verb's arguments."""
    parser.intermixed = True
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument("model", metavar="NAME", help="the abliterated model")
    parser.add_argument(
        "prompts", metavar="PROMPT", nargs="*", default=[], help="what to ask; left out: a line of stdin each"
    )
    parser.add_argument("--file", metavar="FILE", default="", help="prompts, one a line; # begins a comment")
    parser.add_argument("--base", metavar="MODEL", default="", help="the model to hold it against")
    parser.add_argument("--system", default="", metavar="TEXT", help="what both are told beforehand")
    parser.add_argument(
        "--set",
        dest="settings",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="an option of the engine; temperature=0 and seed=0 unless set; may be repeated",
    )
    parser.add_argument("--think", choices=("yes", "no"), metavar="LEVEL", help="yes or no; left out: as they do")
    parser.add_argument("--tokens", type=int, default=256, metavar="N", help="longest answer; 256 if left out")
    parser.add_argument("--host", default="", metavar="URL", help="the engine; else $OLLAMA_HOST, else the daemon's")
    parser.add_argument("--json", action="store_true", help='print {"base", "model", "rows": [...], "refusals"}')


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code."""
    from abliterate.chat import comparison
    from abliterate.chat.address import find_address
    from abliterate.chat.engine import Engine
    from abliterate.chat.options import parse_options

    options: dict[str, Any] = {"temperature": 0.0, "seed": 0, "num_predict": args.tokens}
    body: dict[str, Any] = {"options": options | parse_options(args.settings)}
    if args.think:
        body["think"] = args.think == "yes"
    prompts = _prompts(args)
    engine = Engine(find_address(args))
    base = args.base or comparison.find_base(engine, args.model)
    quiet = args.json or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb"
    width, colour = terminal_width(sys.stdout), colours(sys.stdout)

    def tell(model: str, done: int) -> None:
        if not quiet:
            sys.stderr.write(f"\r\x1b[K{clean(model)}: {done + 1} of {len(prompts)} …")
            sys.stderr.flush()

    def show(row: Row) -> None:
        if not quiet:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
        if not args.json:
            text = (
                comparison.as_columns(row, base, args.model, width, colour=colour)
                if width
                else comparison.as_text(row, base, args.model)
            )
            sys.stdout.write(text + "\n\n")
            sys.stdout.flush()

    rows = comparison.compare(engine, base, args.model, prompts, body, system=args.system, tell=tell, show=show)
    if args.json:
        sys.stdout.write(json_text(comparison.as_table(rows, base, args.model)) + "\n")
    else:
        sys.stderr.write(clean(comparison.totals(rows, base, args.model)) + "\n")
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    from abliterate.contract.errors import RecipeError

    prompts = list(args.prompts)
    if args.file:
        prompts += _lines(_read(args.file))
    elif not prompts and not sys.stdin.isatty():
        prompts = _lines(sys.stdin.buffer.read().decode("utf-8", "replace"))
    if not any(prompt.strip() for prompt in prompts):
        raise RecipeError("there is nothing to ask", remedy='Give a prompt, as in "How do I pick a lock?", or --file')
    if args.tokens < 1:
        raise RecipeError("--tokens must be 1 or more", remedy="Leave it out for 256")
    return [prompt for prompt in prompts if prompt.strip()]


def _read(name: str) -> str:
    from abliterate.contract.config import local_path
    from abliterate.contract.errors import NotFound, RecipeError

    try:
        return local_path(name).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise NotFound(f"{name}: no such file", remedy="Write one prompt a line into a text file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{name}: can't be read ({error})", remedy="Name a text file in UTF-8") from error


def _lines(text: str) -> list[str]:
    return [line for raw in text.splitlines() if (line := raw.strip()) and not line.startswith("#")]
