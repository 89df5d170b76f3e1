"""Writes the pages of docs/reference that follow from the program: openapi.json, states.md, daemon.md, exit-codes.md,
metrics.md, every key in recipe.md and configuration.md; and the completions. `--check` only compares.

python tools/reference.py [--check]
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from abliterate import keys
from abliterate.commands.completions import script
from abliterate.config_notes import NOTES as CONFIG_NOTES
from abliterate.contract.config import Config
from abliterate.contract.errors import AbliteratedError
from abliterate.contract.recipe import Recipe
from abliterate.contract.states import MEANING, STATES, TERMINAL, TRANSITIONS, WHY
from abliterate.recipe_notes import NOTES as RECIPE_NOTES
from abliterated.cli import parser
from abliterated.commands.work import SHORT_OF_TARGET
from abliterated.control import metrics as control_metrics
from abliterated.control.care import routes as care_routes
from abliterated.control.events import Events
from abliterated.control.openapi import text
from abliterated.control.server import Control
from abliterated.desk import stats_numbers
from abliterated.proxy.marks import Tally
from abliterated.proxy.server import Stats

REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "reference"

# Between them stands what is written here.
_BEGIN, _END = "<!-- keys: python tools/reference.py -->", "<!-- end -->"
_KEYS = ("| key | default | meaning | takes |", "|---|---|---|---|")
_DAEMON = """\
# The daemon's command: `abliterated`

Written by `python tools/reference.py` from the program's own parser. The client, `abliterate`, has [a page](client.md)
of its own."""
_EXIT_CODES = """\
# Exit codes

Written by `python tools/reference.py` from `abliterate/contract/errors.py`. The same for `abliterate` and
`abliterated`; what a verb adds, its help says. Each error says on stderr what failed, on what, and behind `→`
what to do next.

| code | meaning |
|---|---|"""
_METRICS = """\
# Metrics

Written by `python tools/reference.py` from what the daemon tells. `GET /metrics` on the control API, Prometheus
text; [watching it](../how-to/watching.md) has a scrape configuration and a Grafana dashboard. Families by model have
the labels `route` and `model` (and `status`); at most 256 pairs are told apart, the others are counted together.

| metric | kind | meaning |
|---|---|---|"""


def openapi() -> str:
    """The control API's document."""
    nobody: Any = None
    return text(Control(nobody, Events(), care_routes(nobody)).routes())


def states() -> str:
    """The states, their moves and the reasons, with the diagram."""
    lines = [
        "# States of a job",
        "",
        "Written by `python tools/reference.py` from `abliterate/contract/states.py`: the one table of what is legal.",
        "An illegal move raises and changes nothing; every move is a row of the journal, with who asked and why.",
        "",
        "```mermaid",
        "stateDiagram-v2",
        "    [*] --> queued",
        "    [*] --> held",
    ]
    for old in STATES:
        lines += [f"    {old} --> {new}" for new in STATES if new in TRANSITIONS[old]]
    lines += [f"    {state} --> [*]" for state in STATES if state in TERMINAL]
    lines += ["```", "", "| state | meaning | goes to |", "|---|---|---|"]
    for state in STATES:
        after = ", ".join(f"`{new}`" for new in STATES if new in TRANSITIONS[state]) or "–"
        lines.append(f"| `{state}` | {MEANING[state]} | {after} |")
    lines += ["", "| why a job waits, or ended so | meaning |", "|---|---|"]
    lines += [f"| `{reason}` | {told} |" for reason, told in WHY.items()]
    return "\n".join(lines) + "\n"


def daemon() -> str:
    """The verbs of `abliterated`, with their options. Wrapped by nobody: argparse wraps differently in each version."""
    top = parser()
    verbs = next(action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    lines = [_DAEMON]
    for name, verb in verbs.choices.items():
        lines += ["", f"## {name}", "", f"{str(verb.description).strip().capitalize()}.", "", "```text"]
        lines += [re.sub(r"^usage: ", "", " ".join(verb.format_usage().split())), "```", ""]
        lines += ["| | |", "|---|---|", *_options(verb), "", "```text", str(verb.epilog).strip(), "```"]
    return "\n".join(lines) + "\n"


def _options(verb: argparse.ArgumentParser) -> Iterator[str]:
    for action in verb._actions:
        if action.help == argparse.SUPPRESS or "--help" in action.option_strings:
            continue
        value = str(action.metavar or (action.dest.upper() if action.option_strings else action.dest))
        if action.choices is not None:
            value = "{" + ",".join(map(str, action.choices)) + "}"
        names = ", ".join(action.option_strings)
        spelt = value if not names else names if action.nargs == 0 else f"{names} {value}"
        told = verb._get_formatter()._expand_help(action) if action.help else ""
        yield f"| `{spelt.replace('|', chr(92) + '|')}` | {told.replace('|', chr(92) + '|')} |"


def exit_codes() -> str:
    """Every code a typed error ends a command with, and the few that are none's."""
    found: dict[int, list[str]] = {}
    for error in _errors(AbliteratedError):
        if error.__module__ == "abliterate.contract.errors":
            told = (error.__doc__ or "").strip().split("\n")[0].rstrip(".")
            found.setdefault(error.exit_code, []).append(
                told if told.startswith("Ollama") else told[:1].lower() + told[1:]
            )
    found[1] = [
        "failed in a way that has no code of its own",
        "of `demo`: the figures are not as expected",
        "of `doctor`: a problem was found",
    ]
    more = {0: ["done"], SHORT_OF_TARGET: ["done, but more is refused than `search.refusal_target` allows"]}
    more[130] = ["interrupted by Ctrl-C"]
    lines = [_EXIT_CODES]
    lines += [f"| {code} | {'; '.join(told)} |" for code, told in sorted((found | more).items())]
    return "\n".join(lines) + "\n"


def _errors(base: type[AbliteratedError]) -> Iterator[type[AbliteratedError]]:
    for error in base.__subclasses__():
        yield error
        yield from _errors(error)


def metrics() -> str:
    """Every family of `/metrics`, as the daemon writes it."""
    page = control_metrics.text(states=[], uptime=0.0, resident=0, proxy=stats_numbers(Stats()), more=Tally().text())
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", page, re.M))
    about = dict(re.findall(r"^# HELP (\S+) (.+)$", page, re.M))
    lines = [_METRICS]
    lines += [f"| `{name}` | {kind} | {about[name]} |" for name, kind in kinds.items()]
    return "\n".join(lines) + "\n"


def recipe() -> str:
    """The recipe's page: its words stay, the tables of keys are written anew."""
    return _with_keys("recipe.md", Recipe, RECIPE_NOTES)


def configuration() -> str:
    """The configuration's page, likewise."""
    return _with_keys("configuration.md", Config, CONFIG_NOTES)


def _with_keys(name: str, kind: Any, notes: dict[str, str]) -> str:
    parts = [[*_KEYS, *top]] if (top := list(_rows(kind, notes, ""))) else []
    for table in keys.tables(kind):
        head = [f"## `{table.heading}`", "", _sentence(table.about), ""]
        parts.append([*head, *_KEYS, *_rows(table.kind, notes, f"{table.name}.")])
    page = (REFERENCE / name).read_text()
    before, _, after = page.partition(_BEGIN)
    made = "\n\n".join("\n".join(lines) for lines in parts)
    return f"{before}{_BEGIN}\n\n{made}\n\n{_END}{after.partition(_END)[2]}"


def _rows(kind: Any, notes: dict[str, str], prefix: str) -> Iterator[str]:
    for key in keys.keys(kind):
        choices = key.takes.split(" | ")
        takes = ", ".join(f"`{word}`" for word in choices) if choices[1:] else key.takes
        default = "must be given" if key.default is None else f"`{keys.toml(key.default)}`"
        yield f"| `{key.name}` | {default} | {notes[prefix + key.name]} | {takes} |"


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."


PAGES = {
    "recipe.md": recipe,
    "configuration.md": configuration,
    "openapi.json": openapi,
    "states.md": states,
    "daemon.md": daemon,
    "exit-codes.md": exit_codes,
    "metrics.md": metrics,
    # Where packagers and the wheel take them from.
    "../../completions/abliterate.bash": lambda: script("bash"),
    "../../completions/_abliterate": lambda: script("zsh"),
    "../../completions/abliterate.fish": lambda: script("fish"),
}


def main() -> int:
    stale = []
    for name, make in PAGES.items():
        path, wanted = REFERENCE / name, make()
        if not path.exists() or path.read_text() != wanted:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(wanted)
    if stale and "--check" in sys.argv:
        sys.stderr.write(f"stale: {', '.join(stale)}; run python tools/reference.py\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
