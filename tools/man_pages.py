"""The man pages in `docs/man`, generated from the two programs' parsers: `make man`. A test holds them to it.

One page a program and one a verb, as git has them. Does not know what a verb does.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from abliterate import __version__
from abliterate.cli import VERBS, build_parser
from abliterated.cli import parser as daemon_parser

FOLDER = Path(__file__).parents[1] / "docs" / "man"


def pages() -> dict[str, str]:
    """Every page by its file's name."""
    client, verbs = build_parser()
    daemon = daemon_parser()
    found = {
        "abliterate.1": _program(client, "abliterate", "queue recipes and follow them", dict(VERBS), "abliterated")
    }
    for name, verb in verbs.items():
        verb.load()
        found[f"abliterate-{name}.1"] = _verb(verb, "abliterate", name, VERBS[name])
    summaries = {name: str(verb.description or "") for name, verb in _subparsers(daemon)}
    about = "a sidecar for Ollama that takes the refusals out of models"
    found["abliterated.1"] = _program(daemon, "abliterated", about, summaries, "abliterate")
    for name, verb in _subparsers(daemon):
        found[f"abliterated-{name}.1"] = _verb(verb, "abliterated", name, summaries[name])
    return found


def write(folder: Path) -> None:
    """Write them all, and take away those whose verb is gone."""
    folder.mkdir(parents=True, exist_ok=True)
    made = pages()
    for old in folder.glob("*.1"):
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")


def _program(parser: argparse.ArgumentParser, name: str, about: str, verbs: dict[str, str], other: str) -> str:
    parts = [*_head(name, about, parser), ".SH VERBS"]
    for verb, summary in verbs.items():
        parts += [".TP", f"\\fB{roff(verb)}\\fR", f"{roff(_first(summary))}; see \\fB{name}\\-{roff(verb)}\\fR(1)"]
    parts += [*_options(parser), *_epilog(parser.epilog), ".SH SEE ALSO", f"\\fB{other}\\fR(1)"]
    return "\n".join(parts) + "\n"


def _verb(parser: argparse.ArgumentParser, program: str, name: str, summary: str) -> str:
    parts = [*_head(f"{program}-{name}", _first(summary), parser), *_options(parser), *_epilog(parser.epilog)]
    return "\n".join([*parts, ".SH SEE ALSO", f"\\fB{program}\\fR(1)"]) + "\n"


def _head(name: str, about: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield '.\\" Generated from the program by `make man`.'
    yield f'.TH "{roff(name.upper())}" 1 "" "abliterated {__version__}" "abliterated"'
    yield ".SH NAME"
    yield f"{roff(name)} \\- {roff(about)}"
    yield ".SH SYNOPSIS"
    # One line, which man wraps: argparse's own wrapping is another in each version.
    yield roff(" ".join(re.sub(r"^usage: ", "", parser.format_usage()).split()))
    if parser.description:
        yield ".SH DESCRIPTION"
        yield roff(parser.description)


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    named = [action for action in parser._actions if not isinstance(action, argparse._SubParsersAction)]
    for title, group in (
        ("ARGUMENTS", [action for action in named if not action.option_strings]),
        ("OPTIONS", [action for action in named if action.option_strings]),
    ):
        shown = [action for action in group if action.help != argparse.SUPPRESS]
        if shown:
            yield f".SH {title}"
        for action in shown:
            yield ".TP"
            yield _spelt(action)
            yield roff(_help(parser, action))


def _spelt(action: argparse.Action) -> str:
    value = str(action.metavar or (action.dest.upper() if action.option_strings else action.dest))
    if not action.option_strings:
        return f"\\fI{roff(value)}\\fR"
    names = ", ".join(f"\\fB{roff(name)}\\fR" for name in action.option_strings)
    return names if action.nargs == 0 else f"{names} \\fI{roff(value)}\\fR"


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action) if action.help else ""


def _epilog(text: str | None) -> Iterator[str]:
    """Paragraphs that begin with `word:` are sections; their lines stand as they are."""
    for part in re.split(r"\n\s*\n", text.strip("\n")) if text else ():
        title, _, rest = part.partition(":")
        if re.fullmatch(r"[a-z ,]{3,40}", title.strip()):
            yield f".SH {roff(title.strip().upper())}"
            part = rest.strip("\n")
        else:
            yield ".PP"
        yield ".nf"
        yield roff(part)
        yield ".fi"


def _subparsers(parser: argparse.ArgumentParser) -> list[tuple[str, argparse.ArgumentParser]]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return list(actions[0].choices.items())


def _first(text: str) -> str:
    return text.strip().split("\n")[0].rstrip(".")


def roff(text: str) -> str:
    """`text` as roff shows it unchanged, whatever a line begins with."""
    plain = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join(f"\\&{line}" if line[:1] in (".", "'") else line for line in plain.split("\n"))


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="where the pages go")
    write(options.parse_args().folder)
